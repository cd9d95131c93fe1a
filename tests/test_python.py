"""Training from Python, as in a notebook: the same process trains again and again."""
from conftest import run

SCRIPT = '''
import os, signal, time
from cli import InputError
from sppo import SPPO, TrainConfig, train

small = dict(steps=1, prompts_per_step=4, minibatch=4, eval_every=0, engine="transformers")
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
        train(TrainConfig(**small, **options, output="FOLDER/no"), SPPO)
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
'''


def test_train_can_be_called_again_whatever_happened(tmp_path):
    (tmp_path / "notebook.py").write_text(SCRIPT.replace("FOLDER", str(tmp_path)))
    done = run(tmp_path / "notebook.py")
    assert done.returncode == 0, done.stderr
    assert "raised InputError in the middle of a run" in done.stdout and "raised KeyboardInterrupt" in done.stdout
    assert done.stdout.strip().endswith(f"Curves: {tmp_path}/Fails/curves.png")
