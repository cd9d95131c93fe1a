"""Training from Python, as in a notebook: the same process trains again and again."""
import re

from conftest import run

SCRIPT = '''
import importlib.util, os, signal, time
from cli import InputError
from sppo import SPPO, Baseline, TrainConfig, train

small = dict(steps=1, prompts_per_step=4, minibatch=4, eval_every=0, engine="transformers",
             dataset="chain:100", max_response_tokens=48)
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

class Fails(SPPO):
    def advantages(self, batch):
        raise InputError("in the middle of a run")

class Interrupted(SPPO):
    def advantages(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2.1)  # a second signal sooner than that counts as the first
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

def complaint(**options):
    try:
        train(TrainConfig(**small | options, output="FOLDER/no"), SPPO)
    except InputError as error:
        return str(error)

assert "/nowhere.jsonl: no such file" in complaint(dataset="/nowhere.jsonl")
for baseline, expected in ((Fails, InputError), (Interrupted, KeyboardInterrupt)):
    try:
        train(TrainConfig(**small, output=f"FOLDER/{baseline.__name__}"), baseline)
    except expected as error:
        print("raised", type(error).__name__, error)
metrics, folder = train(TrainConfig(**small, output="FOLDER/Fails"), SPPO)  # its lock is free again
assert metrics["step"] == 1 and 0 <= metrics["reward"] <= 1 and folder == "FOLDER/Fails/model", (metrics, folder)
assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

# A run that is interrupted while its model gets its name has none yet, and goes on from its checkpoint.
evaluated = small | dict(eval_every=1, eval_problems=20, save_every=1)
rename = os.rename
def interrupted(old, new):
    if str(new).endswith("/model"):
        raise KeyboardInterrupt
    rename(old, new)
os.rename = interrupted
try:
    train(TrainConfig(**evaluated, output="FOLDER/more"), SPPO)
except KeyboardInterrupt:
    os.rename = rename
assert os.path.exists("FOLDER/more/model.partial") and not os.path.exists("FOLDER/more/model")
metrics, folder = train(TrainConfig(**evaluated, resume=True, output="FOLDER/more"), SPPO)
assert metrics["step"] == 1 and 0 <= metrics["eval_accuracy"] <= 1, metrics  # though no step was left to do
assert os.path.exists("FOLDER/more/model/tokenizer.json") and not os.path.exists("FOLDER/more/model.partial")

# With another seed, what it has trained on would be held out.
held_out = open("FOLDER/more/held_out.jsonl").read()
try:
    train(TrainConfig(**evaluated | dict(steps=2), seed=1, resume=True, output="FOLDER/more"), SPPO)
except InputError as error:
    print("resumed:", error)
assert open("FOLDER/more/held_out.jsonl").read() == held_out and held_out.count("row") == 20
train(TrainConfig(**evaluated, model="FOLDER/more", output="FOLDER/same"), SPPO)
print("now another seed")
train(TrainConfig(**evaluated, seed=1, model="FOLDER/more", output="FOLDER/other"), SPPO)

class Groups(Baseline):
    samples_per_prompt = 2

if importlib.util.find_spec("vllm"):
    try:
        train(TrainConfig(**small | dict(engine="vllm"), oversample=1.0, old_logprobs="rollout", output="FOLDER/groups"), Groups)
    except InputError as error:
        assert "--oversample 1.0: Groups compares the responses to a prompt" in str(error)
    else:
        raise AssertionError("groups would be mixed")
'''


def test_train_can_be_called_again_whatever_happened(tmp_path):
    (tmp_path / "notebook.py").write_text(SCRIPT.replace("FOLDER", str(tmp_path)))
    done = run(tmp_path / "notebook.py")
    assert done.returncode == 0, done.stderr
    assert "raised InputError in the middle of a run" in done.stdout and "raised KeyboardInterrupt" in done.stdout
    assert f"Curves: {tmp_path}/Fails/curves.png" in done.stdout
    before, after = done.stdout.split("now another seed")
    of_20 = r"/more or a run before it has trained on \d+ of the 20 problems to be held out now; give the --seed"
    assert re.search("resumed: .*" + of_20, before) and not re.search("warning: .*" + of_20, before)
    assert re.search("warning: .*" + of_20, after)
