"""The command line: `anycontrast VERB config.yaml key=value ...`.

Exit codes: 0 done; 1 a bug of ours (with a traceback); 2 configuration or usage; 3 data (a study,
the manifest, a shard, or a file that cannot be read or written); 5 checkpoint; 6 release;
7 training or the cluster; 130 interrupted (run the same command to go on).
"""

import ast
import dataclasses
import difflib
import inspect
import json
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from anycontrast import __version__
from anycontrast.log import setup_logging
from anycontrast.verbs import VERBS, UsageError, benches

logger = logging.getLogger(__name__)

_BUG, _CONFIG, _DATA, _INTERRUPTED = 1, 2, 3, 130
# By name, so that telling a usage error from others loads none of the libraries behind them.
_CODES = {
    "UsageError": _CONFIG,
    "ConfigError": _CONFIG,
    "CheckpointError": 5,
    "ReleaseError": 6,
    "TrainingError": 7,
    "StudyError": _DATA,
    "TrainingInterrupted": _INTERRUPTED,
    "KeyboardInterrupt": _INTERRUPTED,
}
_SETTING = re.compile(r"[A-Za-z_][\w.]*(\[[^\]]*\])?=.*", re.DOTALL)


def _help() -> str:
    lines = [
        f"anycontrast {__version__}: pretrain 3D MRI transformers on any subset of contrasts",
        "",
        "usage: anycontrast VERB ...          anycontrast VERB --help lists the verb's settings",
        "",
        *(f"  {name:12} {verb.usage:37} {verb.help}" for name, verb in VERBS.items()),
        "",
        "CONFIG is a YAML file; key=value words override it, e.g. pretrain.steps=500. Everything a",
        "run makes lies under <root>/<name>/, by default runs/demo/. Results are JSON on standard",
        "output, messages go to standard error.",
        "",
        "Exit codes: " + (__doc__ or "").partition("Exit codes: ")[2].strip(),
    ]
    return "\n".join(lines)


def _verb_help(name: str) -> str:
    verb = VERBS[name]
    lines = [f"usage: anycontrast {name} {verb.usage}", "", verb.help]
    if verb.sections:
        from anycontrast.training.config import Config

        sections = {field.name: field.default_factory for field in dataclasses.fields(Config)}
        lines += ["", "Settings, with their defaults:"]
        for section in verb.sections:
            make = sections[section]
            assert callable(make), f"{section} is a section of Config"
            lines += _settings(make(), f"{section}.")
    if name == "bench":
        for bench, options in benches().items():
            lines += ["", f"Settings of {bench}, with their defaults:", *_settings(options(), "")]
    return "\n".join(lines)


def _settings(config: object, prefix: str) -> Iterator[str]:
    """One line per field with its default, and below it the docstring that stands under it."""
    documented = _field_docs(type(config))
    assert dataclasses.is_dataclass(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{field.name}.")
            continue
        yield f"  {prefix}{field.name}={json.dumps(value, default=str)}"
        text = " ".join(documented.get(field.name, "").split()).replace("None", "null")
        yield from textwrap.wrap(text, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _field_docs(kind: type) -> dict[str, str]:
    """Field name -> the string that stands under it in the source, base classes included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[field.target.id] = str(text.value.value)
    return found


def exit_code_of(error: BaseException) -> int:
    """Which documented exit code an error stands for."""
    names = [kind.__name__ for kind in type(error).__mro__]
    code = next((_CODES[name] for name in names if name in _CODES), None)
    if code is not None:
        return code
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("anycontrast"):
        return _CONFIG
    if isinstance(error, OSError) and error.filename is not None:
        return _DATA
    return _BUG


def message_of(error: BaseException) -> str:
    """What a user is told of an error, on one line."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by the keyboard"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the library {error.name!r} is not installed; training and the phantom need "
            "`pip install 'anycontrast[train]'`"
        )
    if type(error).__module__ == "builtins" and isinstance(error, OSError):
        return (
            f"{error.filename}: {error.strerror}; check the path, its permissions and the free "
            "space"
        )
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def guarded(run: Callable[[], object]) -> int:
    """Run a verb or a recipe: user mistakes end in one line, bugs of ours in a traceback.

    Returns:
        The exit code; what `run` returned is printed as JSON on standard output.
    """
    try:
        result = run()
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code_of(error)
        if code == _BUG:
            raise
        logger.debug("where it happened", exc_info=True)
        word = "interrupted" if code == _INTERRUPTED else "error"
        print(f"anycontrast: {word}: {message_of(error)}", file=sys.stderr)
        return code
    if result is not None:
        print(json.dumps(result, indent=2, default=str))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else _CONFIG
    if words[0] == "--version":
        print(__version__)
        return 0
    setup_logging()
    name, *rest = words
    if name in VERBS and any(word in {"-h", "--help"} for word in rest):
        return guarded(lambda: print(_verb_help(name)))
    return guarded(lambda: _run(name, rest))


def _run(name: str, rest: list[str]) -> object:
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"verbs: {', '.join(VERBS)}"
        raise UsageError(f"no verb {name!r}; {hint}")
    if options := [word for word in rest if word.startswith("-")]:
        raise UsageError(
            f"{name} has no option {options[0]!r}; settings are key=value words, and "
            f"`anycontrast {name} --help` lists them"
        )
    overrides = [word for word in rest if _SETTING.fullmatch(word) and not Path(word).exists()]
    positional = [word for word in rest if word not in overrides]
    try:
        return VERBS[name].run(positional, overrides)
    except UsageError as error:
        raise UsageError(f"{error}; usage: anycontrast {name} {VERBS[name].usage}") from None


if __name__ == "__main__":
    sys.exit(main())
