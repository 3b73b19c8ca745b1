"""docs/api.md from docstrings: `python -m rl.tools.api_page > docs/api.md`, in the checkout.

In: the sources of what a user's own code meets, as text; nothing is imported. Out: the page on standard output, with
the signature and the docstring of each object, and those of its public methods.
"""

import ast
import inspect
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterator

# The objects by chapter, as `module: names`. A name alone is a function or a class with its public methods.
CHAPTERS: dict[str, dict[str, tuple[str, ...]]] = {
    "Runs": {"rl.api": ("train", "load", "Run"), "rl.rollout.evaluation": ("SourceResult", "EvalResult")},
    "Rewards": {"rewards.contract": ("elementwise", "needs_group", "RewardSpec")},
    "Environments": {"rewards.environment": ("Environment", "Step")},
    "Policies": {"rl.models.policy": ("Policy", "WavePolicy"), "rl.models.inputs": ("Inputs",)},
    "States": {
        "rl.state.states": (
            "InitStateFn",
            "AbstractState",
            "get_abstract_state",
            "create_sharded_state",
            "setup_training_state",
            "setup_decode_state",
            "get_first_step",
        ),
        "rl.models.train_state": ("PureState", "TrainState", "TrainStateNNX"),
    },
    "The train step": {"rl.training.train_step": ("jit_train_step", "Minibatch", "UpdateMetrics")},
    "Samplers": {"rl.sampler.contract": ("CompletionSource", "Request", "Completion")},
}
_SHORT = {"rl.api": "rl"}  # where a name is imported from in place of its module
_ROOT = pathlib.Path(__file__).parents[2]
_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Yields):(.*)$")
_FIELD = re.compile(r"[a-z_]+(, [a-z_]+)*: ")
_WIDTH = 100  # characters of a line
_HEAD = """\
# API

<!-- Written by `python -m rl.tools.api_page` from the docstrings. -->

What your own code meets. The configuration is in [configuration.md](configuration.md), the
arguments of reward functions in [rewards.md](rewards.md). Letters at the end of a name are
dimensions: P prompts, G completions of a prompt, B rows, T token positions, V vocabulary, D width.
"""


def page() -> str:
    """The text of docs/api.md."""
    parts = [_HEAD]
    for title, modules in CHAPTERS.items():
        parts.append(f"## {title}\n")
        for module, names in modules.items():
            nodes = {node.name: node for node in _definitions(ast.parse(_source(module)))}
            for name in names:
                parts += _entry(nodes[name], f"{_SHORT.get(module, module)}.{name}", "###")
    return "\n".join(parts).rstrip("\n") + "\n"


def _source(module: str) -> str:
    return (_ROOT / f"{module.replace('.', '/')}.py").read_text()


def _definitions(node: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.ClassDef]:
    return [part for part in node.body if isinstance(part, ast.FunctionDef | ast.ClassDef)]


def _entry(node: ast.FunctionDef | ast.ClassDef, name: str, level: str) -> list[str]:
    """The heading, signature and docstring of an object, and the entries of its methods."""
    parts = [f"{level} {name}\n", f"```python\n{_signature(node)}\n```\n"]
    text = ast.get_docstring(node, clean=False)
    if text:
        parts.append(_markdown(inspect.cleandoc(text)))
    if isinstance(node, ast.ClassDef):
        for part in _definitions(node):
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                parts += _entry(part, f"{name.rpartition('.')[2]}.{part.name}", "####")
    return parts


def _signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The first lines of a definition, or a class with its fields."""
    if isinstance(node, ast.ClassDef):
        fields = [_code(part) for part in node.body if isinstance(part, ast.AnnAssign)]
        bases = f"({', '.join(map(_code, node.bases))})" if node.bases else ""
        head = f"class {node.name}{bases}:"
        return "\n    ".join([head, *fields]) if fields else f"{head} ..."
    parameters = list(_parameters(node.args))
    result = f") -> {_code(node.returns)}: ..." if node.returns else "): ..."
    marks = [d.id for d in node.decorator_list if isinstance(d, ast.Name) and d.id in ("property", "classmethod")]
    head = "".join(f"@{mark}\n" for mark in marks) + f"def {node.name}("
    line = f"def {node.name}({', '.join(parameters)}{result}"
    if len(line) <= _WIDTH:
        return f"{head}{', '.join(parameters)}{result}"
    return head + "\n" + "".join(f"    {parameter},\n" for parameter in parameters) + result


def _code(node: ast.AST) -> str:
    """The code of a node, with double quotes."""
    text = ast.unparse(node)
    return text if '"' in text else text.replace("'", '"')


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    """The parameters of a signature, the marks / and * among them."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    for place, (argument, default) in enumerate(zip(plain, defaults, strict=True), 1):
        yield _parameter(argument, default)
        if place == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg is not None:
        yield f"*{_parameter(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.kwarg is not None:
        yield f"**{_parameter(arguments.kwarg, None)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {_code(argument.annotation)}" if argument.annotation else ""
    equals = " = " if annotation else "="
    return f"{argument.arg}{annotation}{'' if default is None else equals + _code(default)}"


def _markdown(text: str) -> str:
    """A docstring as Markdown: its sections become lists with an item for each entry."""
    blocks, lines = [], text.splitlines()
    while lines:
        found = _SECTION.match(lines[0])
        if not found:
            size = next((i for i, line in enumerate(lines) if i and _SECTION.match(line)), len(lines))
            blocks += [_paragraph(block) for block in "\n".join(lines[:size]).strip("\n").split("\n\n")]
            lines = lines[size:]
            continue
        size = next((i for i, line in enumerate(lines) if i and line and not line.startswith(" ")), len(lines))
        body = textwrap.dedent("\n".join(lines[1:size])).strip("\n")
        items = re.sub(r"\n +", " ", "\n".join(filter(None, [found[2].strip(), body]))).split("\n")
        blocks += [f"{found[1]}:", "\n".join(_wrapped(item, "- ", "  ") for item in items if item)]
        lines = lines[size:]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _paragraph(block: str) -> str:
    lines = block.splitlines()
    if all(line.startswith("    ") for line in lines):
        return block
    if all(line.startswith(("- ", "  ")) for line in lines):
        return block
    if all(_FIELD.match(line) or line.startswith("  ") for line in lines):  # `name: what it is`, and lines that go on
        items = re.sub(r"\n +", " ", block).split("\n")
        return "\n".join(_wrapped(item, "- ", "  ") for item in items)
    return _wrapped(re.sub(r"\n *", " ", block), "", "")


def _wrapped(text: str, first: str, later: str) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False, break_long_words=False
    )


if __name__ == "__main__":
    sys.stdout.write(page())
