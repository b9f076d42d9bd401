"""SFT samples and preference pairs: from a dataset section to tokens, masks, and a report of what became of the rows."""

from rayrlhf.data.supervised_records import DatasetReport, PreferencePair, SupervisedSample

__all__ = ["DatasetReport", "PreferencePair", "SupervisedSample"]
