"""`make install` runs this: it makes .venv and installs a file of requirements into it. It needs only Python.

    python3 tools/install.py requirements-cpu.txt --torch-index https://download.pytorch.org/whl/cpu

Packages come from where pip gets them on this machine. They are installed with uv, which takes a fraction of
pip's time, and with pip where there is no uv.
"""
import argparse
import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
EXCLUDED = ROOT / "tools" / "excluded.txt"  # what vLLM for CPUs asks for in vain


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("requirements")
    parser.add_argument("--torch-index", required=True,
                        help="where torch for CPUs is, if pip's usual places do not have it")
    parser.add_argument("--with", dest="tool", choices=("uv", "pip"), default="uv")
    arguments, start = parser.parse_args(), time.time()
    cpu = "cpu" in arguments.requirements
    check_machine(cpu)
    if not run(sys.executable, "-m", "venv", ROOT / ".venv"):
        sys.exit("Python could not make .venv. (On Debian and Ubuntu: sudo apt install python3-venv)")
    size = "0.5 GB to download, a minute or two" if cpu else "several GB to download, some minutes"
    say(f"Installing {arguments.requirements} into .venv: {size} on a fast network.")
    if not (arguments.tool == "uv" and with_uv(arguments.requirements, arguments.torch_index, cpu)
            or with_pip(arguments.requirements, arguments.torch_index, cpu)):
        sys.exit("Not everything could be installed: see the reason above, and docs/running.md for help.")
    vllm = run(PYTHON, "-c", "import importlib.util, sys; sys.exit(not importlib.util.find_spec('vllm'))")
    engine = "vLLM" if vllm else "There is no vLLM for this machine: transformers"
    say(f"Installed in {time.time() - start:.0f} s. {engine} will do the sampling.")


def check_machine(cpu):
    """Before anything is made or fetched."""
    if not (3, 10) <= sys.version_info < (3, 15):
        sys.exit(f"Python {sys.version.split()[0]} will not do: PyTorch 2.13 is built for 3.10 to 3.14. "
                 "With another one that you have: make install PYTHON=python3.12")
    needed, free = 4 if cpu else 20, shutil.disk_usage(ROOT).free / 1e9
    if free < needed and not (ROOT / ".venv" / "installed").exists():
        sys.exit(f"Too little space: {free:.1f} GB are free on the disk of {ROOT}, and {needed} are needed.")


def with_uv(requirements, torch_index, cpu):
    if not run(PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "uv"):
        return say("There is no uv to be had. Pip does the same, and takes minutes.")
    # uv reads none of pip's settings, so pass them on. Like pip, it shall compare all indexes.
    pip = pip_settings()
    install = [PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON,
               "--index-strategy", "unsafe-best-match"]
    options = {"index-url": "--default-index", "extra-index-url": "--index", "find-links": "--find-links",
               "trusted-host": "--allow-insecure-host"}
    for name, option in options.items():
        for value in pip.get(name, "").split():
            install += [option, value]
    variables = {"cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY", "timeout": "UV_HTTP_TIMEOUT"}
    variables = {variable: pip[name] for name, variable in variables.items() if name in pip}
    if cpu:
        install += ["--excludes", EXCLUDED, *torch_from(torch_index, install, requirements, variables)]
    if not run(*install, "-r", requirements, **variables):
        return say("Uv could not do it. Now pip tries, which takes minutes.")
    return True


def with_pip(requirements, torch_index, cpu):
    install = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    if cpu:
        install += torch_from(torch_index, install, requirements)
    if not run(*install, "-r", requirements):
        return False
    if cpu:  # pip cannot leave them out
        run(PYTHON, "-m", "pip", "uninstall", "--quiet", "--yes", "-r", EXCLUDED)
    return True


def pip_settings():
    """Pip's settings on this machine, of files and PIP_... variables: {"index-url": "https://...", ...}."""
    listed = subprocess.run([PYTHON, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True).stdout
    found = {}
    # An environment variable counts more than a file, so it comes last.
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")  # such as global.timeout='60' and :env:.timeout='60'
        found[name.split(".", 1)[1].replace("default-timeout", "timeout")] = ast.literal_eval(value)
    return found


def torch_from(index, install, requirements, variables=()):
    """The option that adds `index`, if pip's usual places lack the torch that is required. (PyPI's torch for
    Linux is the CUDA build.)"""
    lines = (ROOT / requirements).read_text().splitlines()
    torch = [line.split("#")[0].strip() for line in lines if line.startswith("torch==")]
    if run(*install, "--quiet", "--dry-run", "--no-deps", *torch, quiet=True, **dict(variables)):
        return []
    say(f"PyTorch comes from {index}")
    return ["--extra-index-url", index]


def run(*command, quiet=False, **variables):
    """Runs a command in the repository; returns whether it succeeded."""
    output = subprocess.DEVNULL if quiet else None
    done = subprocess.run([*map(str, command)], cwd=ROOT, env={**os.environ, **variables}, stdout=output,
                          stderr=output)
    return not done.returncode


def say(line):
    print(line, flush=True)


if __name__ == "__main__":
    main()
