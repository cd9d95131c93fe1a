"""The pieces that the README invites you to copy: each runs in a folder of its own, with nothing but the files it names."""
import inspect
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, environment

import grpo
import policy
import ppo
import reward
import sharded
import spo
import sppo
from cli import BUILTIN_MODEL

PASTED = {  # what is copied: (sources that are pasted one after the other, imports, what is done with it)
    "sequence_advantages": ([sppo.sequence_advantages], "import torch", """
        print(sequence_advantages(torch.tensor([1.0, 0.0]), torch.zeros(2)).tolist() == [0.5, -0.5])"""),
    "clipped_policy_loss": ([sppo.clipped_policy_loss], "import torch", """
        logprobs = torch.zeros(2, 3, requires_grad=True)
        loss, _ = clipped_policy_loss(logprobs, torch.zeros(2, 3), torch.tensor([1.0, -2.0]), torch.ones(2, 3))
        loss.backward()
        print(torch.allclose(logprobs.grad, torch.tensor([[-1.0], [2.0]]).expand(2, 3) / 6))"""),
    "group_advantages": ([grpo.all_equal, grpo.group_advantages], "import torch", """
        print(group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 2)[2:].tolist() == [0.0, 0.0])"""),
    "gae": ([ppo.gae], "import torch", """
        advantages, returns = gae(torch.tensor([[0.0, 1.0]]), torch.full((1, 2), 0.25), torch.ones(1, 2))
        print(advantages.tolist() == [[0.75, 0.75]] and returns.tolist() == [[1.0, 1.0]])"""),
    "ValueTracker": ([spo.ValueTracker], "import numpy as np", """
        tracker = ValueTracker(2)
        tracker.update([0], [1.0], [0.0])
        print(tracker.values([0, 1]).tolist() == [1.48 / 1.96, 0.5])"""),
    "ChunkedLogProbs": ([policy.compiled, policy.ChunkedLogProbs],
                        "import functools\nimport torch\nCHUNK_ELEMENTS = 20", """
        hidden, weight, targets = torch.randn(7, 4), torch.randn(9, 4), torch.arange(7)
        logprobs, _ = ChunkedLogProbs.apply(hidden, weight, targets, 1.0)
        whole = (hidden @ weight.T).log_softmax(-1)[torch.arange(7), targets]
        print(torch.allclose(logprobs, whole, atol=1e-5))"""),
    "micro_batches": ([sharded.micro_batches], "import torch.distributed as dist", """
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
        print(sorted(sum(micro_batches([5, 1, 4, 2, 9], 10), [])) == [0, 1, 2, 3, 4])"""),
}
ENDED = "\nif __name__ == '__main__':\n"


def runs(folder, code, timeout=300):
    """What `code`, as a script in `folder`, prints. Nothing of this repository is on its path."""
    (folder / "script.py").write_text(code)
    clean = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, env=clean, capture_output=True, text=True,
                          timeout=timeout)
    return done.stdout.split(), done.stderr


def test_pasted_into_a_script(tmp_path):
    """Each is a script with names of its own. One process runs them all: importing torch takes longer than they do."""
    for name, (pieces, imports, use) in PASTED.items():
        (tmp_path / f"{name}.py").write_text("\n".join([imports, *map(inspect.getsource, pieces), textwrap.dedent(use)]))
    printed, error = runs(tmp_path, f"import runpy\nfor name in {[*PASTED]}:\n    print(name)\n    runpy.run_path(f'{{name}}.py')")
    assert printed == [word for name in PASTED for word in (name, "True")], error


USE_VERIFIER = """
    verifier = Verifier(1, 2.0)
    print(verifier.score(["So \\\\boxed{1/2}.", "None."], ["0.5", "0.5"]) == [1.0, 0.0])
    verifier.close()"""


@pytest.mark.parametrize("how", ["copied", "pasted", "pasted without a guard"])
def test_the_verifier(tmp_path, how):
    """Its workers import the file in which it stands: they must not run what the file does."""
    for name in ("equality.py", "notation.py", *(["reward.py"] if how == "copied" else [])):
        shutil.copy(ROOT / name, tmp_path)
    if how == "copied":
        code = "from reward import Verifier\n" + textwrap.dedent(USE_VERIFIER)
    elif how == "pasted":
        code = inspect.getsource(reward) + ENDED + USE_VERIFIER
    else:  # then a worker says what is wrong, and starts no workers of its own
        code = inspect.getsource(reward) + textwrap.dedent(USE_VERIFIER)
    printed, error = runs(tmp_path, code)
    if how == "pasted without a guard":
        assert "runs under `if __name__ == '__main__':`" in error
    else:
        assert printed == ["True"], error


def test_an_engine_with_the_files_that_it_names(tmp_path):
    """vLLM's imports the same files, and takes longer to start."""
    for name in ("engines.py", "cli.py", "log.py", "machine.py", "reward.py", "equality.py", "notation.py"):
        shutil.copy(ROOT / name, tmp_path)
    printed, error = runs(tmp_path, f"""
from engines import TransformersEngine
from machine import init_distributed
if __name__ == "__main__":
    engine = TransformersEngine({BUILTIN_MODEL!r}, init_distributed(), stop=[], max_tokens=32, dtype="float32")
    print(all(len(r.ids) == 5 for _, r in engine.generate([[1, 2, 3], [4, 5]], temperature=1.0, max_tokens=5)))
    engine.close()
""")
    assert "True" in printed, error


def test_the_critic_of_the_docstring_learns(tmp_path):
    """critic.py's head holds the whole critic in plain PyTorch. Here it learns to tell two prompts apart."""
    example = re.search(r"(?s)(?:all of it is|it\nis) this:\n\n(.*)\Z", sys.modules["critic"].__doc__)[1]
    printed, error = runs(tmp_path, f"MODEL, LR = {BUILTIN_MODEL!r}, 1e-3\n" + textwrap.dedent(example) + """
losses = [update(["Compute 1+2 modulo 10.", "Compute 9-4-4 modulo 10."], torch.tensor([1.0, 0.0])) for _ in range(100)]
print(abs(losses[0] - 0.6931) < 1e-3, losses[-1] < 0.2)
""")
    assert printed == ["True", "True"], error
