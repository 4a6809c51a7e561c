"""MkDocs hook that writes the configuration page: options of every verb and class."""

import html
import inspect
import re
from collections.abc import Callable
from typing import Any

import docstring_parser

from lit_longctx import position
from lit_longctx.checkpoint import export
from lit_longctx.checkpoint.gguf import import_gguf
from lit_longctx.data.finetuning import ChatSource, FinetuneData
from lit_longctx.data.making.mixture import mix
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.making.synthesize import synthesize
from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.data.sampling.position_transforms import E2LLM, PoSE, SkipAlign
from lit_longctx.data.sampling.stages import Stage
from lit_longctx.evaluation.evaluate import evaluate
from lit_longctx.evaluation.loss.held_out import LossRows
from lit_longctx.evaluation.retrieval.grid import Grid
from lit_longctx.generate import generate_text
from lit_longctx.model import LlamaConfig
from lit_longctx.model.layers import LayerKind, LayerPattern
from lit_longctx.training import checkpoints, module, parallel, probes, schedule

QUALIFIED = re.compile(r"\b(?:\w+\.)+(?=\w)")
"""Modules before the name of a class."""
SCHEMES = [getattr(position, name) for name in position.__all__]
"""Abstract ones among them are left out."""
SECTIONS: dict[str, list[Callable[..., Any]]] = {
    "Verbs": [prepare, mix, synthesize, evaluate, export, import_gguf, generate_text],
    "fit: `model`": [module.ContinualPretrain, module.SFT],
    "fit: `model.position`": [
        each
        for each in SCHEMES
        if inspect.isclass(each) and not inspect.isabstract(each) and each is not position.Rotary
    ]
    + [LayerPattern, LayerKind],
    "fit: `model.config`": [LlamaConfig],
    "fit: `model.schedule`": [
        schedule.WarmupCosine,
        schedule.WarmupLinear,
        schedule.WarmupConstant,
    ],
    "fit: `data`": [PretrainData, Source, FinetuneData, ChatSource, Stage],
    "fit: `data.position_transform`": [PoSE, SkipAlign, E2LLM],
    "fit: `trainer` and the rest": [
        parallel.FSDP2Strategy,
        checkpoints.Checkpoints,
        probes.Probes,
        LossRows,
        Grid,
    ],
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Append the tables to configuration.md; other pages stay as they are."""
    if page.file.src_uri != "configuration.md":
        return markdown
    parts = [markdown]
    for title, objects in SECTIONS.items():
        parts += [f"## {title}", *(section(each) for each in objects)]
    return "\n\n".join(parts)


def section(item: Callable[..., Any]) -> str:
    """Return heading, first sentence and a table of options."""
    docs = docstring_parser.parse_from_object(item)
    said = {param.arg_name: " ".join((param.description or "").split()) for param in docs.params}
    name = item.__name__.removesuffix("_text").removesuffix("_gguf")
    lines = [f"### {name}", "", docs.short_description or "", ""]
    parameters = [
        (name, parameter)
        for name, parameter in inspect.signature(item).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if parameters:
        lines += ["| option | type | default | |", "|---|---|---|---|"]
    for name, parameter in parameters:
        kind = _shown(QUALIFIED.sub("", inspect.formatannotation(parameter.annotation)))
        empty = parameter.default is parameter.empty
        default = "required" if empty else _shown(repr(parameter.default))
        lines.append(f"| `{name}` | {kind} | {default} | {_escaped(said.get(name, ''))} |")
    return "\n".join(lines)


def _shown(code: str) -> str:
    return f"<code>{html.escape(code).replace('|', '&#124;')}</code>"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
