"""Decisions become the rows of the repaired dataset."""

import pyarrow as pa

from rayrlhf.batch_inference.parts import PartFolder, merge
from rayrlhf.pipelines.presft.dataset import repair
from rayrlhf.pipelines.presft.probing import schemas


def test_decisions_are_carried_out_in_order_and_numbered_again(tmp_path):
    decided = [
        ("keep", None, ["original 0"]),
        ("replace", "new 1", ["new 1"]),
        ("drop", None, []),
        ("mix", "new 3", ["original 3", "new 3"]),
        ("drop", "new 4", []),
    ]
    relabeled = PartFolder(tmp_path / "relabeled")
    names = schemas()["relabeled"].names
    for index, (action, new, _) in enumerate(decided):
        row = dict.fromkeys(names) | {"row": index, "source": index + 1, "prompt": f"p{index}", "response": f"original {index}"}
        row |= {"decision": action, "new_response": new, "columns": "{}"}
        relabeled.write(index, pa.Table.from_pylist([row], schema=schemas()["relabeled"]))
    repaired = PartFolder(tmp_path / "repaired")
    assert repair(relabeled, repaired) == 4
    rows = list(repaired.rows())
    assert [row["response"] for row in rows] == [text for _, _, texts in decided for text in texts]
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert [row["source"] for row in rows] == [1, 2, 4, 4]
    assert merge(repaired, tmp_path / "one.parquet") == 4
