"""Run by test_models.py: a training script whose engine gets one layer with its rows in another order."""
import sys

import policy
import sppo
from cli import clear_errors

weights = policy.Policy.weights


def damaged(self, dtype=None):
    for name, tensor in weights(self, dtype):
        yield name, tensor.flip(0) if name == "model.layers.1.mlp.up_proj.weight" else tensor


policy.Policy.weights = damaged
with clear_errors():
    sppo.train(sppo.TrainConfig.parse(None, sys.argv[1:]), sppo.SPPO)
