"""Nothing that came with a file is run: where code of ours could, with the reason why it does not.

The source is read as a syntax tree, so that a word in a text is no finding. A new place needs a
line here, with its reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "core" / "src", *sorted(ROOT.glob("plugins/*/src"))]

# file -> what it calls -> why that runs nothing of a user's file
ALLOWED: dict[str, dict[str, str]] = {
    "core/src/autodeco/settings.py": {
        "yaml.load": "with a SafeLoader that also refuses merges and doubles",
    },
    "core/src/autodeco/testing/worker.py": {
        "torch.load": "weights_only, and a file that the same test has just written",
        "import_module": "the plugin under test, by the name of its installed package",
    },
    "core/src/autodeco/testing/checks.py": {
        "import_module": "modules of autodeco.testing, from a table in the source",
    },
    "core/src/autodeco/testing/ranks.py": {
        "subprocess.Popen": "this Python on our own worker, a list of words",
    },
    "core/src/autodeco/testing/metadata.py": {
        "subprocess.run": "this Python, to see what importing the installed plugin loads",
    },
    "core/src/autodeco/convert/shards.py": {
        "import_module": "the decoder that an installed plugin names, never a checkpoint",
    },
    "core/src/autodeco/convert/nemo_context.py": {
        "subprocess.run": "the Python that --nemo-python names on our own script, a list of words",
    },
    "core/src/autodeco/convert/nemo_context_script.py": {
        "import_module": "NeMo's importer, which an installed plugin names, never a checkpoint",
    },
    "core/src/autodeco/registry.py": {
        "entry.load": "an entry point of an installed package: that is what a plugin is",
    },
    "core/src/autodeco/scaffold/sizes.py": {
        "eval": "texts that stand in the same function",
    },
    "core/src/autodeco/scaffold/trial.py": {
        "import_module": "the package that `plugin new` has just written",
    },
    "core/src/autodeco/scaffold/writing.py": {
        "subprocess.run": "this Python on the package that was just written, a list of words",
    },
    "core/src/autodeco/doctor/machine.py": {
        "subprocess.run": "nvidia-smi and this Python, lists of words that stand there",
    },
}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
#: Calls by their last names, whatever they hang on.
CALLS = {
    *("import_module", "run_path", "run_module", "exec_module", "spec_from_file_location"),
    *("popen", "Popen", "check_output", "check_call", "getoutput", "execv", "execvp"),
    *("Unpickler", "unsafe_load", "full_load", "load_all", "get_class_from_dynamic_module"),
}
#: Calls by the name before the dot and the one behind it.
PAIRS = {
    *(("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("yaml", "load")),
    *(("marshal", "loads"), ("joblib", "load"), ("dill", "load"), ("shelve", "open")),
    *(("subprocess", "run"), ("entry", "load"), ("np", "load"), ("numpy", "load")),
    *(("os", "system"), ("builtins", "eval"), ("builtins", "exec")),
}
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "ctypes"}


def files() -> Iterator[tuple[str, ast.Module]]:
    for folder in SOURCES:
        for path in sorted(folder.rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def called(node: ast.Call) -> str | None:
    """The name of a call that could run something."""
    function = node.func
    if isinstance(function, ast.Name):
        return function.id if function.id in CALLS | BUILT_IN else None
    if not isinstance(function, ast.Attribute):
        return None
    owner = function.value.id if isinstance(function.value, ast.Name) else ""
    if (owner, function.attr) in PAIRS or function.attr in CALLS:
        if function.attr == "import_module":
            return "import_module"
        return f"{owner}.{function.attr}"
    return None


def test_what_could_run_code_stands_on_the_list_and_nothing_else_does() -> None:
    found: dict[str, set[str]] = {}
    for name, tree in files():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (call := called(node)):
                found.setdefault(name, set()).add(call)
    assert found == {name: set(calls) for name, calls in ALLOWED.items()}


def test_no_module_that_unpickles_is_imported() -> None:
    """`inert_pickle` takes the numbers of instructions from `pickle`, and calls nothing of it."""
    found = []
    for name, tree in files():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            found += [f"{name}: {n}" for n in names if n.split(".")[0] in MODULES]
    assert found == ["core/src/autodeco/convert/inert_pickle.py: pickle"]
    path = ROOT / "core/src/autodeco/convert/inert_pickle.py"
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "pickle"
    }
    assert used and all(name.isupper() or name[:-1].isupper() for name in used), used


def keywords() -> Iterator[tuple[str, str, ast.expr]]:
    for name, tree in files():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield from ((name, k.arg, k.value) for k in node.keywords if k.arg)
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        yield name, key.value, value


def test_no_keyword_lets_a_file_run_code() -> None:
    for name, keyword, value in keywords():
        constant = value.value if isinstance(value, ast.Constant) else None
        where = f"{name}:{value.lineno}: {keyword}={ast.unparse(value)}"
        if keyword in ("shell", "allow_pickle"):
            assert constant is False, where
        if keyword == "weights_only":
            assert constant is True, where
        if keyword == "trust_remote_code":
            handed_on = ast.unparse(value) in ("trust_remote_code", "job.trust_remote_code")
            handed_on |= ast.unparse(value) == "self.job.trust_remote_code"
            assert constant is False or handed_on, where


def test_code_of_a_checkpoint_is_off_unless_the_flag_is_given() -> None:
    from autodeco.job import Job

    assert Job().trust_remote_code is False
    for name, tree in files():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            arguments = node.args
            pairs = list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
            positional = arguments.args[len(arguments.args) - len(arguments.defaults) :]
            pairs += zip(positional, arguments.defaults, strict=True)
            for argument, default in pairs:
                if argument.arg == "trust_remote_code" and default is not None:
                    assert ast.unparse(default) == "False", f"{name}:{node.lineno}"


def test_transformers_is_never_asked_without_saying_so() -> None:
    """from_pretrained without trust_remote_code asks at a terminal; a hub name may bring code."""
    ours = {
        "core/src/autodeco/decoding/model.py",  # its options come from the caller, off by default
        "core/src/autodeco/testing/logits.py",  # a checkpoint that the kit has just written
    }
    for name, tree in files():
        if name in ours:
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
                and ast.unparse(node.func.value).startswith("Auto")
            ):
                given = {k.arg for k in node.keywords}
                assert "trust_remote_code" in given or None in given, f"{name}:{node.lineno}"
