"""Names for classes of libraries that are slow to import; for annotations only.

The libraries have no types of their own, or they are not followed, so a type checker reads `Any`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from pyarrow import Table as ArrowTable
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    ArrowTable = DeepSpeedEngine = PretrainedConfig = PreTrainedModel = Tokenizer = object

__all__ = ["ArrowTable", "DeepSpeedEngine", "PreTrainedModel", "PretrainedConfig", "Tokenizer"]
