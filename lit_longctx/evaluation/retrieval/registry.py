"""The retrieval tasks by name."""

from lit_longctx.evaluation.retrieval.helmet import JsonKv, NiahMk2, NiahMk3, NiahMv
from lit_longctx.evaluation.retrieval.key_values import KeyValues
from lit_longctx.evaluation.retrieval.ruler import (
    CommonWords,
    FrequentWords,
    MultiKey,
    MultiQuery,
    MultiValue,
    VariableTracking,
)
from lit_longctx.evaluation.retrieval.tasks import FirstSentence, Needle, Passkey, Task

TASKS: dict[str, type[Task]] = {
    "passkey": Passkey,
    "needle": Needle,
    "first_sentence": FirstSentence,
    "multi_key": MultiKey,
    "multi_value": MultiValue,
    "multi_query": MultiQuery,
    "variable_tracking": VariableTracking,
    "common_words": CommonWords,
    "frequent_words": FrequentWords,
    "key_values": KeyValues,
    "helmet_json_kv": JsonKv,
    "helmet_niah_mk_2": NiahMk2,
    "helmet_niah_mk_3": NiahMk3,
    "helmet_niah_mv": NiahMv,
}
"""Every task by the name it has on the command line."""


def task_named(name: str) -> Task:
    """Return the task of that name with its default settings."""
    if name not in TASKS:
        raise ValueError(f"task {name!r} unknown; expected one of {', '.join(TASKS)}")
    return TASKS[name]()
