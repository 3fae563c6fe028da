"""Writes the files beside it, with real torch and transformers (made with torch 2.13 and transformers 5.23):

    python tests/data/huggingface/make_golden.py
"""

import collections
import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

import transformers_oracle as oracle  # noqa: E402


def write_state_dicts():
    """State dicts by torch.save in its formats, with what a reader can get wrong, and the values beside them."""
    import torch

    torch.manual_seed(0)
    table = torch.randn(5, 6)
    tensors = collections.OrderedDict(
        parameter=torch.nn.Parameter(torch.randn(4, 3)), transposed=torch.randn(3, 4).T, scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3), shared=table, part=table[1:4, 2::2], row=table[3],
        repeated=torch.randn(3, 1).expand(3, 2),
        double=torch.randn(2, dtype=torch.float64), half=torch.randn(3).half(), bfloat16=torch.randn(3).bfloat16(),
        long=torch.arange(-2, 3), int=torch.arange(3, dtype=torch.int32), short=torch.arange(3, dtype=torch.int16),
        char=torch.tensor([-3, 4], dtype=torch.int8), byte=torch.tensor([250], dtype=torch.uint8),
        bool=torch.tensor([True, False, True]))
    linear = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)).state_dict()
    linear.update(tensors)   # a module's state dict carries _metadata
    torch.save(linear, HERE / "zip.bin")
    torch.save(linear, HERE / "legacy.bin", _use_new_zipfile_serialization=False)
    wrapped = {"step": 7, "size": table.shape, "device": torch.device("cpu"), "rates": [0.5, None], "model": linear}
    torch.save(wrapped, HERE / "wrapped.bin", pickle_protocol=4)
    values = {name: x.detach().float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()
              for name, x in linear.items()}
    np.savez_compressed(HERE / "state_dict.npz", **values)


def write_outputs(name, network):
    import torch

    config, length = oracle.CASES[name]
    data = oracle.batch(config, length)
    module = oracle.build(network, config)
    shapes = {key: tuple(x.shape) for key, x in module.named_parameters()}
    missing = module.load_state_dict({k: torch.from_numpy(x) for k, x in oracle.weights(shapes).items()}, strict=False)
    assert not missing.unexpected_keys
    module.tie_weights()
    out = oracle.theirs(network, module, data)
    real = data["attention_mask"] == 1
    np.savez_compressed(
        HERE / f"{name}_{network}.npz", shapes=json.dumps(shapes), loss=np.float32(out["loss"]),
        logits=oracle.sample(out["logits"][real], 400),
        states=np.stack([oracle.sample(x[real], 200) for x in out["states"]]),
        gradients=np.stack([oracle.sample(out["gradients"][key], 16) for key in shapes]))


if __name__ == "__main__":
    write_state_dicts()
    for golden in oracle.GOLDEN:
        for part in oracle.NETWORKS:
            write_outputs(golden, part)
    for file in sorted(HERE.iterdir()):
        print(file.name, file.stat().st_size)
