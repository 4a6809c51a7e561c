"""`lit_longctx VERB …`: fit, validate and test through LightningCLI; other verbs are functions."""

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import isabstract
from typing import Any

VERBS = {
    "fit": "train: continue pretraining from a checkpoint, or from random weights",
    "validate": "held-out loss of a checkpoint, by position and source",
    "test": "the same as validate, under its own name in the log",
    "prepare": "documents → token chunks, a manifest and a token ledger",
    "mix": "prepared sources → the same with more long documents, and a report",
    "evaluate": "what the longer context is worth: tables and figures for checkpoints",
    "export": "a run's newest checkpoint → Hugging Face folder",
    "import": "a GGUF file (llama.cpp's) → Hugging Face folder, dequantized",
    "generate": "continue a prompt",
    "synthesize": "long documents → questions and answers, by a model or from nothing",
    "plan": "memory, FLOPs and time of a config before it runs",
    "doctor": "versions, devices and which attention kernels run here",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; errors are one line and a nonzero exit code, tracebacks only with --debug."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    trust = "--trust" in given
    given = [a for a in given if a not in ("--debug", "--trust")]
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not debug:
        # of other libraries: what concerns the user is an error here
        warnings.filterwarnings("ignore", module=r"(?!lit_longctx)")
    try:
        if trust:
            from lit_longctx.checkpoint.trust import trusting

            with trusting():
                return run(given[0], given[1:])
        return run(given[0], given[1:])
    except KeyboardInterrupt:
        return complain("interrupted")
    except Exception as error:
        if debug:
            raise
        return complain(one_line(error), getattr(error, "exit_code", 1))


def usage() -> str:
    """Text of --help; imports nothing, so that it answers at once."""
    verbs = "\n".join(f"  {verb:10} {text}" for verb, text in VERBS.items())
    return (
        "usage: lit_longctx VERB [options]\n\nExtend a Llama-type model to long context.\n\n"
        f"{verbs}\n\nlit_longctx VERB --help lists a verb's options; --debug shows tracebacks;\n"
        "--trust lets a run folder import a position scheme of yours."
    )


def run(verb: str, rest: list[str]) -> int:
    """Import what the verb needs, and only that, and run it; return the exit code."""
    if verb not in VERBS:
        raise ValueError(f"verb {verb!r} unknown; expected one of {', '.join(VERBS)}")
    if verb in ("fit", "validate", "test"):
        from lit_longctx.training.fit import fit

        return fit([verb, *rest])
    if verb == "plan":
        from lit_longctx.training.plan import plan

        plan(rest)
        return 0
    call(_function(verb), verb, rest)
    return 0


def _function(verb: str) -> Callable[..., Any]:
    if verb == "prepare":
        from lit_longctx.data.making.prepare import prepare as function
    elif verb == "mix":
        from lit_longctx.data.making.mixture import mix as function
    elif verb == "evaluate":
        from lit_longctx.evaluation.evaluate import evaluate as function
    elif verb == "export":
        from lit_longctx.checkpoint import export as function
    elif verb == "import":
        from lit_longctx.checkpoint.gguf import import_gguf as function
    elif verb == "generate":
        from lit_longctx.generate import generate_text as function
    elif verb == "synthesize":
        from lit_longctx.data.making.synthesize import synthesize as function
    else:
        from lit_longctx.doctor import doctor as function
    return function


def call(function: Callable[..., Any], verb: str, rest: list[str]) -> None:
    """Parse a function's arguments from its signature (flags, or --config FILE) and call it."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"lit_longctx {verb}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_function_arguments(function, fail_untyped=False)
    options = parser.instantiate(parser.parse_args(rest))
    del options["config"]
    function(**options)


def complain(message: str, code: int = 1) -> int:
    """Print an error and return the exit code, which is 2 for a key of earlier configs."""
    print(f"lit_longctx: error: {message}", file=sys.stderr)
    return 2 if NOW_CALLED in message else code


TRACEBACK = re.compile(r"^\s*(?:\w+\.)*\w+(?:Error|Exception): ", re.MULTILINE)
"""What stands before the message at the end of a traceback."""
NOISE = re.compile(
    r"Does not validate against any of|Subtypes: |Errors:$|Given value|"
    r"Expected a <class 'NoneType'>$|Expected a path but "
)
"""Lines of jsonargparse's nested errors that tell the user nothing."""
NO_SCHEME = r"Expected an instantiatable class, but [\w.]+\.PositionScheme is abstract"
"""What jsonargparse says of a pattern of layers before it has tried to read one."""
PLAINER = (
    (re.compile(r"Parser key \"([^\"]*)\": ?"), r"\1: "),
    (re.compile(r"Problem with given class_path '(?:\w+\.)*(\w+)': ?"), r"\1: "),
    (re.compile(r"Expected a dot import path string: ?"), "no class named "),
    (re.compile(r"\b(no class named (\w+)) no class named \2\b"), r"\1"),
    (re.compile(r"(?<=is not accepted) LayerPattern: Option '[\w.]+' is not accepted"), ""),
    (re.compile(rf"{NO_SCHEME} (?!LayerPattern: Option)"), ""),
    (re.compile(NO_SCHEME), "a scheme needs its class_path;"),
)


RENAMED = {
    "lanes": "contiguous",
    "places": "position_transform",
    "forced": "teacher_forced",
    "FromNothing": "TemplatedTask",
    "activation_checkpointing": "recompute, block for true",
}
"""Options and values of earlier configs."""
NOW_CALLED = " is now called "


def one_line(error: BaseException) -> str:
    """Return an error's message on one line; of nested ones only what says what is wrong."""
    message = str(error)
    if "Traceback (most recent call last)" in message:  # from a loader process or another rank
        message = TRACEBACK.split(message)[-1]
    lines = [line.strip(" -") for line in message.splitlines()]
    text = " ".join(line for line in lines if line and not NOISE.match(line))
    for pattern, plain in PLAINER:
        text = pattern.sub(plain, text)
    if "no class named " in text and (known := class_names(message)):
        text = f"{text}; expected one of {', '.join(known)}"
    for old, new in RENAMED.items():
        if re.search(rf"[ .'\"]{old}[ .,'\"]", f" {text} "):
            text += f"; {old}{NOW_CALLED}{new}"
    text = text.strip() or type(error).__name__
    return text if len(text) < 500 else text[:497] + "…"


OWNER = re.compile(r"given class_path '([\w.]+)'")
KEY = re.compile(r"Parser key \"(\w+)\"")
SUBTYPE = re.compile(r"Subtypes: \[<class '([\w.]+)'>")


def class_names(message: str) -> list[str]:
    """Return our classes that jsonargparse's message could have been given; [] if it is unclear."""
    from typing import get_args, get_type_hints

    if owners := OWNER.findall(message):
        hint = get_type_hints(_class(owners[-1]).__init__).get(KEY.findall(message)[-1])
        bases = [k for k in (*get_args(hint), hint) if isinstance(k, type) and isabstract(k)]
    else:
        bases = [_class(name) for name in SUBTYPE.findall(message)[-1:]]
    return sorted({name for base in bases for name in _concrete(base)})


def _class(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(import_module(module), name)


def _concrete(base: type) -> list[str]:
    """Names of this package's classes below one that can be made."""
    if base is type(None):
        return []
    found = [name for kind in base.__subclasses__() for name in _concrete(kind)]
    ours = base.__module__.startswith("lit_longctx.") and not base.__subclasses__()
    return [*found, base.__name__] if ours and not isabstract(base) else found


def entry() -> None:
    """Console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
