"""Linux, macOS, Windows: no module wants what one of them does not have. Simulated: the tests run on Linux."""

import ast
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from test_layout import NAMES, PRODUCT

MODULES = {"fcntl", "resource", "termios", "tty", "pty", "grp", "pwd", "syslog", "msvcrt", "winreg"}
NAMES_OF_SOME = {  # module -> what it has on some systems only
    "os": {"fork", "sysconf", "getuid", "geteuid", "uname", "killpg", "setsid", "sched_getaffinity", "mkfifo", "fchmod",
           "getloadavg", "setpgrp", "statvfs", "nice", "sync", "O_NONBLOCK", "O_NOFOLLOW", "chown", "posix_spawn"},
    "signal": {"SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGCHLD", "setitimer", "alarm"},
}
WINDOWS = """
import importlib, os, signal, sys
for name in {modules}: sys.modules[name] = None
for name in {hidden}:
    module, _, attribute = name.partition(".")
    if hasattr(sys.modules[module], attribute): delattr(sys.modules[module], attribute)
sys.path.insert(0, {root!r})
for name in {names}: importlib.import_module(name)
from training.log import memory
from sd.device import free_memory
import torch
assert memory(torch.device("cpu")) == {{}}
print("all there")
"""


def test_every_module_is_there_without_what_windows_lacks():
    """What torch and others import of it themselves is there already: hidden is what they, too, can do without."""
    hidden = [f"{module}.{name}" for module, names in NAMES_OF_SOME.items() for name in names]
    names = [name for name in NAMES.values() if name and not name.startswith("lab.bench.peers")]
    code = "import torch, av, PIL.Image, tqdm, multiprocessing.util\n" + WINDOWS.format(
        modules=sorted(MODULES), hidden=sorted(hidden), root=ROOT, names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "all there\n", done.stderr[-2000:]


def test_what_only_some_systems_have_is_asked_for_first():
    """An import stands in a try; a name is used behind hasattr of the same name."""
    found = []
    for path in PRODUCT:
        text = Path(path).read_text(encoding="utf-8")
        tree = ast.parse(text)
        tried = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in block.body}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in tried:
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                found += [(NAMES[path], name) for name in names if name in MODULES]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = node.value.id, node.attr
                if name in NAMES_OF_SOME.get(module, ()) and f'hasattr({module}, "{name}")' not in text:
                    found.append((NAMES[path], f"{module}.{name}"))
            if isinstance(node, ast.Constant) and node.value in ("fork", "forkserver"):
                if "get_all_start_methods" not in text and "get_start_method" not in text:
                    found.append((NAMES[path], node.value))
    assert not found
