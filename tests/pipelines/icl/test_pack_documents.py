"""Contexts of related documents: no token lost, neighbours alike, duplicates and empty ones out, and SFT reads them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.cli import app
from rayrlhf.config.data import SupervisedDataSection, SupervisedDatasetSection
from rayrlhf.config.icl import ICLPackConfig
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.model import ModelSection
from rayrlhf.data.supervised.datasets import load_supervised
from rayrlhf.demonstrations.example import Example
from rayrlhf.demonstrations.ranking import Bm25Ranker
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.pipelines.icl.contexts import StoredTokens, relatedness, write_contexts, write_tokens
from rayrlhf.pipelines.icl.document_path import Piece
from rayrlhf.pipelines.icl.example_pool import write_pool, write_vectors
from rayrlhf.pipelines.icl.neighbors import DocumentEncoder, NeighborFinder, NeighborPlan
from rayrlhf.pipelines.icl.pack_documents import check_packing

TINY = "builtin:tiny?layers=1&hidden=64"
NEAREST = ("neighbors.by=nearest", f"neighbors.encoder={TINY}")
TOPICS = 4


def config(*overrides: str) -> ICLPackConfig:
    return load_config(ICLPackConfig, None, [f"model.path={TINY}", "data.path=none.jsonl", *overrides])


def texts(count: int) -> list[str]:
    """Document n is of topic n modulo `TOPICS`; only those of a topic share words."""
    draw = random.Random(0)
    words = [[f"t{number % TOPICS}w{draw.randrange(12)}" for _ in range(10)] for number in range(count)]
    return [" ".join([*document, f"own{number}"]) for number, document in enumerate(words)]


def linked(documents: list[str], folder: Path, settings: ICLPackConfig) -> list[dict[str, Any]]:
    """Run one process's work without Ray."""
    import pyarrow as pa

    write_pool([[Example(f"d:{number}", text, "") for number, text in enumerate(documents)]], folder)
    load_tokenizer(settings.model).save_pretrained(folder / "tokenizer")
    if settings.neighbors.by == "bm25":
        Bm25Ranker.build(iter(documents), folder / "bm25")
    else:
        vectors = DocumentEncoder(settings)(pa.table({"prompt": documents})).column("vector").to_pylist()
        write_vectors(iter([np.array(vectors, dtype=np.float32)]), len(documents), folder / "vectors.npy")
    rows = pa.table({"row": range(len(documents)), "source": range(1, len(documents) + 1)})
    made: list[dict[str, Any]] = NeighborFinder(NeighborPlan(settings, folder))(rows).to_pylist()
    return made


def test_by_words_neighbours_are_of_the_own_topic_and_never_the_document_itself(tmp_path: Path) -> None:
    rows = linked(texts(24), tmp_path, config("neighbors.count=8"))
    for number, row in enumerate(rows):
        # There are five others of the topic: where nothing is shared nothing is joined, though eight were asked for.
        others = [other for other in range(number % TOPICS, 24, TOPICS) if other != number]
        assert sorted(row["neighbors"]) == others
        assert row["copies"] == []


def test_near_duplicates_are_told_and_tokens_end_with_the_end_of_sequence(tmp_path: Path) -> None:
    documents = texts(8)
    documents += [documents[2].upper() + "!", documents[3] + " more"]
    rows = linked(documents, tmp_path, config())
    assert [row["copies"] for row in rows] == [[], [], [8], [9], [], [], [], [], [2], [3]]
    tokenizer = load_tokenizer(ModelSection(path=TINY))
    for text, row in zip(documents, rows, strict=True):
        assert row["tokens"] == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_by_vectors_neighbours_are_those_of_the_largest_cosine(tmp_path: Path) -> None:
    documents = texts(12)
    rows = linked(documents, tmp_path, config(*NEAREST, "neighbors.pooling=mean", "neighbors.count=3"))
    vectors = np.load(tmp_path / "vectors.npy")
    cosines = vectors @ vectors.T - 9 * np.eye(12)
    for number, row in enumerate(rows):
        np.testing.assert_allclose(cosines[number, row["neighbors"]], np.sort(cosines[number])[::-1][:3], atol=1e-6)


def test_a_long_document_asks_with_its_rarest_words(tmp_path: Path) -> None:
    documents = ["common uncommon", "common common common", "common", "uncommon"]
    Bm25Ranker.build(documents, tmp_path)
    query = [Example("q", "uncommon" + 9 * " common", "")]
    assert Bm25Ranker.open(tmp_path).rank(query, 1) == [[1]]
    assert Bm25Ranker.open(tmp_path, max_words=1).rank(query, 2) == [[3, 0]]


def test_contexts_hold_the_tokens_of_their_pieces_and_say_which_rows_they_are_from(tmp_path: Path) -> None:
    import pyarrow as pa

    links = PartFolder(tmp_path / "links")
    links.write(0, pa.table({"source": [1, 3], "tokens": pa.array([[5, 6, 7], [8]], pa.list_(pa.int32()))}))
    links.write(1, pa.table({"source": [4], "tokens": pa.array([[9, 10]], pa.list_(pa.int32()))}))
    write_tokens(links, tmp_path / "tokens")
    tokens = StoredTokens(tmp_path / "tokens")
    assert tokens.lengths.tolist() == [3, 1, 2]
    write_contexts([[Piece(2, 0, 2), Piece(0, 0, 2)], [Piece(0, 2, 3), Piece(1, 0, 1)]], tokens, tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == [
        {"input_ids": [9, 10, 5, 6], "documents": [4, 1]},
        {"input_ids": [7, 8], "documents": [1, 3]},
    ]


def test_relatedness_is_the_mean_over_documents_next_to_each_other() -> None:
    pool = [Example(f"d:{number}", text, "") for number, text in enumerate(["a b", "b c", "c d", "x"])]
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0, -1]], dtype=np.float32)
    assert relatedness([0, 1, 2, 3], pool, None) == {"shared words": pytest.approx((1 / 3 + 1 / 3 + 0) / 3)}
    assert relatedness([0, 1, 2, 3], pool, vectors)["cosine"] == pytest.approx((1 + 0 - 1) / 3)
    assert relatedness([2], pool, None) == {}


def test_a_mistake_is_found_before_the_data_is_read() -> None:
    with pytest.raises(UserError, match="states its pooling; set pooling to mean or cls"):
        check_packing(config(*NEAREST))
    with pytest.raises(UserError, match="belong together"):
        config("neighbors.by=nearest")


@pytest.mark.parametrize(
    "by",
    [
        pytest.param(["neighbors.by=bm25"], marks=pytest.mark.nightly, id="bm25"),
        pytest.param([*NEAREST, "neighbors.pooling=mean"], marks=pytest.mark.nightly, id="nearest"),
    ],
)
def test_the_command_loses_no_token_puts_related_ones_together_and_sft_reads_it(tmp_path: Path, by: list[str]) -> None:
    documents = [*texts(60), " ", texts(60)[5]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text, "completion": 3}) + "\n" for text in documents))
    file = tmp_path / "pack.yaml"
    file.write_text(
        f"model: {{path: '{TINY}'}}\nrun: {{root: {tmp_path}}}\ncontext: 200\n"
        f"data: {{path: {tmp_path / 'rows.jsonl'}, max_rejected_share: 0.1}}\npipeline: {{rows_per_part: 16, builders: 2}}\n"
    )
    result = CliRunner().invoke(app, ["icl", "pack", str(file), *by], catch_exceptions=False)
    assert result.exit_code == 0
    assert "60 of 62 documents" in result.output
    assert "left out: 1 documents: text is empty" in result.output
    assert "left out: 1 near-duplicates" in result.output
    tokenizer = load_tokenizer(ModelSection(path=TINY))
    for name in ("dataset.parquet", "baseline.parquet"):
        rows = pq.read_table(tmp_path / "packed" / name).to_pylist()
        assert all(len(row["input_ids"]) == 200 for row in rows[:-1])
        words = tokenizer.decode([token for row in rows for token in row["input_ids"]]).split(tokenizer.eos_token)
        assert sorted(words) == sorted(["", *texts(60)])
        data = SupervisedDataSection(train=SupervisedDatasetSection(path=str(tmp_path / "packed" / name)))
        samples = load_supervised(data.train, data, tokenizer).samples
        assert [sample.token_ids.tolist() for sample in samples] == [row["input_ids"] for row in rows]
        assert all(sample.loss_mask[1:].all() and not sample.loss_mask[0] for sample in samples)
    report = json.loads((tmp_path / "packed" / "report.json").read_text())
    measure = "shared words" if by == ["neighbors.by=bm25"] else "cosine"
    assert report["relatedness"][measure] > report["relatedness_at_random"][measure]
    before = (tmp_path / "packed" / "dataset.parquet").read_bytes()
    CliRunner().invoke(app, ["icl", "pack", str(file), *by, "pipeline.builders=1"], catch_exceptions=False)
    assert (tmp_path / "packed" / "dataset.parquet").read_bytes() == before
