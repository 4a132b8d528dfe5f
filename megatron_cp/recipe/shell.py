"""Find the training commands that a bash script would start, without running anything that the script runs.

The script is rewritten by its syntax tree and given to bash: assignments, arrays, tests, branches, loops and functions
stay, a launcher's words are recorded in its place, a few commands that only compute texts run, and every other command,
every redirection and every sourced file does nothing. So values that depend on the machine, such as `$(nvidia-smi -L)`,
are empty; what was left out is told.
"""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tree_sitter_bash
from tree_sitter import Language, Node, Parser

from megatron_cp.errors import Refused

SECONDS = 10
# commands that start training, or another command that may
LAUNCHERS = frozenset(
    "torchrun srun mpirun mpiexec deepspeed accelerate python python3 exec env nohup numactl nsys bash sh eval sudo "
    "apptainer singularity docker command time".split()
)
# bash's own commands that change nothing outside of this shell
BUILTINS = frozenset(
    "true false : echo printf set shift shopt exit return break continue let local cd pwd pushd popd wait getopts "
    "test [".split()
)
# commands that print texts made from their arguments
PURE = ("basename", "dirname", "expr", "seq", "cut", "tr", "wc", "head", "tail", "realpath", "readlink")
_OF_BASH = ("PATH", "PWD", "OLDPWD", "SHLVL", "_")
# each record is a file of its own, for the commands of a pipeline run at the same time
_PRELUDE = """
PATH=/nonexistent
__file() { printf -v __file '%s/%s.%06d.%d' "$__folder" "${EPOCHREALTIME:-}" "$((__count++))" "$BASHPID"; }
__launch() {
    local name __file
    __file
    {
        printf 'launch\\0%s\\0' "$#"
        printf '%s\\0' "$@"
        for name in $(compgen -e); do printf '%s\\0' "$name=${!name}"; done
    } >"$__file"
}
__skip() {
    local __file
    __file
    printf 'skip\\0%s\\0' "$1" >"$__file"
}
"""


class Launch(NamedTuple):
    """A command that a script would start: its words, and the environment that it would get."""

    words: list[str]
    environment: dict[str, str]


class Read(NamedTuple):
    """The launches of a script in their order, and the commands that were left out, each once."""

    launches: list[Launch]
    left_out: list[str]


def read_script(text: str, name: str, arguments: list[str], environment: Mapping[str, str]) -> Read:
    """Return what a bash script would start.

    text:        the script
    name:        its path, which the script sees as $0
    arguments:   of the script, $1 and so on
    environment: that it would be started in
    Raises ValueError for syntax that is not bash's, for an error of bash, and for a script that does not end.
    """
    rewritten = rewrite(text, name)
    prelude = _PRELUDE + "".join(
        f'{pure}() {{ {shlex.quote(path)} "$@"; }}\n' for pure in PURE if (path := shutil.which(pure))
    )
    bash = shutil.which("bash")
    if bash is None:
        raise Refused(f"{name}: reading a script needs bash, which this machine lacks; give the command itself")
    with tempfile.TemporaryDirectory() as folder:
        opening = f"__folder={shlex.quote(folder)} __count=0\n{prelude}"
        # as bash is told $0 and the rest
        words = [bash, "--noprofile", "--norc", "-c", f"{opening}{rewritten}", name, *arguments]
        try:
            ran = subprocess.run(
                words,
                env={**environment, "PATH": ""},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise Refused(f"{name}: does not end within {SECONDS} s; give the command that it starts instead") from None
        launches, left_out = _records(Path(folder))
    if not launches and ran.returncode:
        said = ran.stderr.decode(errors="replace").strip().splitlines()
        raise Refused(f"{name}: bash ends with status {ran.returncode}{f': {said[-1]}' if said else ''}")
    return Read([Launch(words, _changed(theirs, environment)) for words, theirs in launches], left_out)


def _changed(theirs: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in theirs.items() if environment.get(key) != value and key not in _OF_BASH}


def _records(folder: Path) -> tuple[list[Launch], list[str]]:
    launches: list[Launch] = []
    left_out: dict[str, None] = {}
    for file in sorted(folder.iterdir()):
        kind, first, *rest = file.read_bytes().decode(errors="replace").split("\0")[:-1]
        if kind == "skip":
            left_out[first] = None
        else:
            words, pairs = rest[: int(first)], rest[int(first) :]
            launches.append(Launch(words, dict(pair.split("=", 1) for pair in pairs)))
    return launches, list(left_out)


def rewrite(text: str, name: str) -> str:
    """Return the script with its commands replaced; raises ValueError with the line of what is not bash's syntax."""
    source = text.encode()
    root = Parser(Language(tree_sitter_bash.language())).parse(source).root_node
    if root.has_error:
        line = next(node for node in _nodes(root) if node.is_error or node.is_missing).start_point[0] + 1
        raise Refused(f"{name}:{line}: cannot read this as bash; give the command that the script starts instead")
    functions = frozenset(
        _text(node.child_by_field_name("name")) for node in _nodes(root) if node.type == "function_definition"
    )
    pieces, end = [], 0
    for edit in sorted(_edits(root, functions)):
        if edit.start >= end:
            pieces += [source[end : edit.start], edit.by.encode()]
            end = edit.end
    return b"".join([*pieces, source[end:]]).decode()


class _Edit(NamedTuple):
    start: int
    # a longer edit before those inside of it
    length: int
    by: str

    @property
    def end(self) -> int:
        return self.start - self.length


def _edit(start: int, end: int, by: str) -> _Edit:
    return _Edit(start, start - end, by)


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _nodes(child)


def _text(node: Any) -> str:
    return node.text.decode() if node is not None and node.text is not None else ""


def _edits(root: Node, functions: frozenset[str]) -> Iterator[_Edit]:
    for node in _nodes(root):
        if node.type in ("file_redirect", "herestring_redirect"):
            yield _edit(node.start_byte, node.end_byte, "")
        elif node.type == "redirected_statement" and any(child.type == "heredoc_redirect" for child in node.children):
            yield _edit(node.start_byte, node.end_byte, _skip(_text(node.children[0])))
        elif node.type == "process_substitution":
            yield _edit(node.start_byte, node.end_byte, "/dev/null")
        elif node.type == "command":
            yield from _edits_of_command(node, functions)


def _edits_of_command(node: Node, functions: frozenset[str]) -> Iterator[_Edit]:
    named = node.child_by_field_name("name")
    word = _text(named)
    literal = re.fullmatch(r"[\w./:\[-]+", word)
    if literal and (word in BUILTINS or word in PURE or word in functions):
        return
    assert named is not None
    if not literal or os.path.basename(word) in LAUNCHERS:
        yield _edit(named.start_byte, named.start_byte, "__launch ")
    else:
        yield _edit(node.start_byte, node.end_byte, _skip(word))


def _skip(text: str) -> str:
    return f"__skip {shlex.quote(text.split()[0] if text.split() else '')}"
