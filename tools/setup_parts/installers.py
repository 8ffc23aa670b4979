"""The two installers: uv, and pip if uv is not available. Both obey pip's settings.

An installer has a ``name``, ``create(folder)``, which creates a virtual environment, and ``install(python, step,
arguments, env)``, where ``step`` is the text shown meanwhile. The pins are complete, so dependencies are not resolved
(--no-deps). Installers do not compile to bytecode: ``compile_bytecode`` does it on all cores and skips modules that are
rarely imported.
"""

import os
import re
import shutil
import subprocess

from .steps import CACHE, SetupError, run, say

UV_VERSION = "0.13.9"
TORCH_INDEX = "MEGATRON_DAGGER_TORCH_INDEX"
# About half of all modules; this project imports them rarely or never.
NOT_COMPILED = "|".join(
    (
        "/tests?/",
        "/torch/testing/_internal/",
        "/pygments/lexers/",
        "/transformers/models/[^/]+/mod(eling|ular)_(?!qwen|llama)",
        "/(anthropic|datasets|libcst|modal|modal_proto|mypy|mypyc|numba|pandas|pyarrow|ray|selenium|sentry_sdk|setuptools)/",
    )
)
_SECTIONS = (":env:", "install", "global")  # the sections of pip's settings, by precedence


class Pip:
    """Plain pip: slower, but always available."""

    name = "pip"

    def __init__(self, python):
        self.python = python

    def create(self, folder):
        run(f"{folder.name}: creating it", [self.python, "-m", "venv", folder])

    def install(self, python, step, arguments, env=None):
        extra = ["--extra-index-url", os.environ[TORCH_INDEX]] if os.environ.get(TORCH_INDEX) else []
        common = ["--no-deps", "--no-compile", "--no-input", "--disable-pip-version-check"]
        run(step, [python, "-m", "pip", "install", *common, *extra, *arguments], env={**(env or {}), **os.environ})


class Uv:
    """uv with pip's settings as arguments, since it does not read them itself."""

    name = "uv"

    def __init__(self, uv, python):
        self.uv = uv
        self.python = python
        self.settings, self.env = translate(pip_settings(python), dict(os.environ))

    def create(self, folder):
        command = [self.uv, "venv", "--allow-existing", "--python", self.python, folder]
        run(f"{folder.name}: creating it", command, env=self.env)

    def install(self, python, step, arguments, env=None):
        common = ["--python", python, "--no-deps", "--no-compile-bytecode"]
        run(step, [self.uv, "pip", "install", *common, *self.settings, *arguments], env={**(env or {}), **self.env})


def compile_bytecode(python, step):
    """Compile the installed modules; without this the first import of the engines takes half a minute.

    Modules that do not compile are ignored, because some are for other versions of Python.
    """
    packages = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True)
    compileall = "import compileall, re, sys; compileall.compile_dir(*sys.argv[1:2], maxlevels=20, "
    compileall += "rx=re.compile(sys.argv[2]), workers=0)"
    run(step, [python, "-c", compileall, packages.strip(), NOT_COMPILED])


def pip_settings(python):
    """Return pip's settings from its files and environment variables: a list of values for each name."""
    done = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60)
    by_section: dict[str, dict[str, list[str]]] = {section: {} for section in _SECTIONS}
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"([^.]+)\.([a-z-]+)='(.*)'", line.strip())
        if match and match[1] in by_section:
            by_section[match[1]][match[2]] = [value for value in re.split(r"\\n|\s+", match[3]) if value]
    settings = {}
    for section in reversed(_SECTIONS):  # as in pip, a section replaces the values of lower precedence
        settings.update(by_section[section])
    return settings


def translate(settings, env):
    """Return the arguments and the environment with which uv follows pip's ``settings``."""
    # pip takes the best version of all its indexes; uv by default stops at the first index that has the name.
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


def choose(name, python):
    """Return the installer ``name``; "auto" is uv if it is there or can be installed, else pip."""
    if name == "pip":
        return Pip(python)
    own = CACHE / "uv" / "bin" / "uv"
    for uv in (own, shutil.which("uv")):
        if _runs(uv):
            return Uv(uv, python)
    target = ["--upgrade", "--target", own.parent.parent, f"uv=={UV_VERSION}"]
    try:  # into a separate folder, to leave the user's Python unchanged
        install = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        run(f"installing uv {UV_VERSION}", [*install, *target])
    except SetupError as error:
        if name == "uv":
            raise
        say(f"uv cannot be installed ({str(error).splitlines()[0]}); using pip, which takes some minutes")
        return Pip(python)
    return Uv(own, python)


def _runs(program):
    """Return whether a program starts. (A pyenv shim exists even if its Python lacks the program.)"""
    if program is None:
        return False
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False
