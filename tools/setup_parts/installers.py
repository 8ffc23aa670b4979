"""The two installers: uv, and plain pip where uv cannot be had. Both obey pip's settings.

An installer has a name, ``create(folder)`` and ``install(python, what, arguments)``. Nothing is
resolved: the pins are complete, so everything is installed with --no-deps. Neither compiles to
bytecode: ``compile_bytecode`` does, on all cores, and leaves out what is hardly ever imported.
"""

import os
import re
import shutil
import subprocess

from setup_parts.steps import CACHE, SetupError, run, say

UV_VERSION = "0.13.9"
TORCH_INDEX = "MEGATRON_DAGGER_TORCH_INDEX"
# Half of all modules, which nothing here imports or only seldom.
NOT_COMPILED = "|".join(
    (
        "/tests?/",
        "/torch/testing/_internal/",
        "/pygments/lexers/",
        "/transformers/models/[^/]+/mod(eling|ular)_(?!qwen|llama)",
        "/(anthropic|datasets|libcst|modal|modal_proto|mypy|mypyc|numba|pandas|pyarrow|ray|selenium|sentry_sdk|setuptools)/",
    )
)
_SECTIONS = (":env:", "install", "global")  # of pip's settings, the strongest first


class Pip:
    """Plain pip: slower, and always there."""

    name = "pip"

    def __init__(self, python):
        self.python = python

    def create(self, folder):
        run(f"{folder.name}: creating it", [self.python, "-m", "venv", folder])

    def install(self, python, what, arguments):
        extra = ["--extra-index-url", os.environ[TORCH_INDEX]] if os.environ.get(TORCH_INDEX) else []
        common = ["--no-deps", "--no-compile", "--no-input", "--disable-pip-version-check"]
        run(what, [python, "-m", "pip", "install", *common, *extra, *arguments])


class Uv:
    """uv, told what pip is configured with, since it reads none of pip's settings itself."""

    name = "uv"

    def __init__(self, uv, python):
        self.uv = uv
        self.python = python
        self.settings, self.env = translate(pip_settings(python), dict(os.environ))

    def create(self, folder):
        command = [self.uv, "venv", "--allow-existing", "--python", self.python, folder]
        run(f"{folder.name}: creating it", command, env=self.env)

    def install(self, python, what, arguments):
        common = ["--python", python, "--no-deps", "--no-compile-bytecode"]
        run(what, [self.uv, "pip", "install", *common, *self.settings, *arguments], env=self.env)


def compile_bytecode(python, what):
    """Compile the installed modules: without it every first import of the engines takes half a minute.

    A module that does not compile is no error: some are for other versions of Python.
    """
    packages = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True)
    compileall = "import compileall, re, sys; compileall.compile_dir(*sys.argv[1:2], maxlevels=20, "
    compileall += "rx=re.compile(sys.argv[2]), workers=0)"
    run(what, [python, "-c", compileall, packages.strip(), NOT_COMPILED])


def pip_settings(python):
    """pip's settings by name, each with its values, from its files and environment variables."""
    done = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60)
    by_section: dict[str, dict[str, list[str]]] = {section: {} for section in _SECTIONS}
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"([^.]+)\.([a-z-]+)='(.*)'", line.strip())
        if match and match[1] in by_section:
            by_section[match[1]][match[2]] = [value for value in re.split(r"\\n|\s+", match[3]) if value]
    settings = {}
    for section in reversed(_SECTIONS):  # as in pip, a stronger section replaces and does not add
        settings.update(by_section[section])
    return settings


def translate(settings, env):
    """uv's arguments and environment that mean the same as pip's ``settings``."""
    # pip takes the best version that any of its indexes has; uv stops at the first that has the name.
    arguments = ["--index-strategy", "unsafe-best-match"]
    extra = [*settings.get("extra-index-url", []), *filter(None, [env.get(TORCH_INDEX)])]
    if settings.get("no-index", ["false"])[0].lower() in ("1", "true", "yes", "on"):
        arguments.append("--no-index")
    elif settings.get("index-url") and not {"UV_INDEX_URL", "UV_DEFAULT_INDEX"} & set(env):
        arguments += ["--index-url", settings["index-url"][0]]
    for flag, values in (
        ("--extra-index-url", extra),
        ("--find-links", settings.get("find-links", [])),
        ("--allow-insecure-host", settings.get("trusted-host", [])),
    ):
        for value in values:
            arguments += [flag, value]
    env = {"UV_HTTP_TIMEOUT": "180", **env}
    if settings.get("cert"):
        env.setdefault("SSL_CERT_FILE", settings["cert"][0])
    return arguments, env


def choose(wanted, python):
    """The installer named ``wanted``; auto takes uv, and pip where uv neither is there nor can be had."""
    if wanted == "pip":
        return Pip(python)
    own = CACHE / "uv" / "bin" / "uv"
    for uv in (own, shutil.which("uv")):
        if _runs(uv):
            return Uv(uv, python)
    target = ["--upgrade", "--target", own.parent.parent, f"uv=={UV_VERSION}"]
    try:  # into a folder of its own: the Python that we were given stays as it is
        install = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        run(f"getting uv {UV_VERSION}", [*install, *target])
    except SetupError as error:
        if wanted == "uv":
            raise
        say(f"uv cannot be had ({str(error).splitlines()[0]}); going on with pip, which takes some minutes")
        return Pip(python)
    return Uv(own, python)


def _runs(program):
    """Whether it starts: a pyenv shim is there even for a Python that lacks the tool."""
    if program is None:
        return False
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False
