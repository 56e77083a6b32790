"""What needs the memory of a tensor works on cached keys and values, or says ``clone()``, and crashes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import copy, io, multiprocessing, pickle, sys, tempfile, warnings
import numpy as np
import safetensors.torch
import torch, torch.multiprocessing, torch.utils.dlpack
from models import prompt, tiny_llama
from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import KVQuantError

warnings.simplefilter("ignore")
torch.multiprocessing.set_sharing_strategy("file_system")
model = tiny_llama()


def saved(x, name):
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_file({"x": x}, folder + "/x")
        return safetensors.torch.load_file(folder + "/x")["x"]


def through_torch_save(x, **options):
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    return torch.load(file, **options)["x"]


def through_queue(x):
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    queue.put(x)
    return queue.get()


SAME = {  # equal to the keys, and nothing that leads back to them
    "numpy": lambda x: torch.tensor(x.numpy()),
    "asarray": lambda x: torch.tensor(np.asarray(x)),
    "array of a dtype": lambda x: torch.tensor(np.array(x, dtype=np.float64)).float(),
    "detach.cpu.numpy": lambda x: torch.tensor(x.detach().cpu().numpy()),
    "float.cpu.numpy": lambda x: torch.tensor(x.float().cpu().numpy()),
    "numpy force": lambda x: torch.tensor(x.numpy(force=True)),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "item": lambda x: torch.tensor([[[[x[b, h, t, d].item() for d in range(x.shape[3])] for t in range(x.shape[2])]
                                     for h in range(x.shape[1])] for b in range(x.shape[0])]),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: through_torch_save(x, weights_only=True),
    "queue": through_queue,
    "from_dlpack": torch.from_dlpack,
    "numpy.from_dlpack": lambda x: torch.tensor(np.from_dlpack(x)),
    "double.float": lambda x: x.double().float(),
    "iteration": lambda x: torch.stack([row for row in x]),
    "torch.tensor": lambda x: torch.tensor(x),
}
WORKS = {
    "repr": repr,
    "format": lambda x: f"{x}",
    "format of one": lambda x: f"{x[0, 0, 0, 0]:.2f}",
    "len": lambda x: len(x) == x.shape[0] or 1 / 0,
    "bool of one": lambda x: bool(x[0, 0, 0, 0]),
    "equal": lambda x: torch.equal(x, x.clone()) or 1 / 0,
    "==": lambda x: (x == x.clone()).all().item() or 1 / 0,
    "hash": hash,
    "data_ptr": lambda x: x.data_ptr(),
    "is_pinned": lambda x: x.is_pinned(),
    "nbytes": lambda x: x.nbytes,
    "meta": lambda x: x.to("meta"),
}
REFUSED = {  # our error, with the remedy
    "untyped_storage": lambda x: x.untyped_storage(),
    "storage": lambda x: x.storage(),
    "share_memory_": lambda x: x.share_memory_(),
}
ANYTHING = {  # C code that no class can answer: an error of torch's, or what a plain tensor gives
    "bool": bool,
    "pin_memory": lambda x: x.pin_memory(),
    "safetensors": lambda x: saved(x, "x"),
    "unbound numpy": torch.Tensor.numpy,
    "unbound tolist": torch.Tensor.tolist,
    "unbound data_ptr": torch.Tensor.data_ptr,
    "unbound storage": lambda x: torch.Tensor.untyped_storage(x)[0],
    "to_dlpack": lambda x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x)).sum(),
    "memoryview": memoryview,
    "cuda array interface": lambda x: x.__cuda_array_interface__,
}

for name, options in {"paged": {}, "static": {"static": True, "max_length": 40}}.items():
    cache = QuantizedPagedCache(model.config, "exact", page_size=16, **options)
    with torch.no_grad():
        model(prompt(2, 35), past_key_values=cache)
    for what, x in {"whole": lambda: cache.layers[0].keys, "view": lambda: cache.layers[0].keys[:, :1]}.items():
        expected = x().clone()
        for kind, functions in {"SAME": SAME, "WORKS": WORKS, "REFUSED": REFUSED, "ANYTHING": ANYTHING}.items():
            for called, function in functions.items():
                print(name, what, called, end=": ", flush=True)
                try:
                    result = function(x())
                except KVQuantError as error:
                    assert kind in ("REFUSED", "ANYTHING") and "clone()" in str(error), error
                except Exception as error:
                    assert kind == "ANYTHING", error
                else:
                    assert kind != "REFUSED", result
                    if kind == "SAME":
                        assert type(result) is torch.Tensor and torch.equal(result, expected), result
                        result.zero_()
                        assert torch.equal(x(), expected)
                print("ok", flush=True)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_nothing_crashes_the_process(mode: str) -> None:
    """In a process of its own, which says as it goes what it is at."""
    script = f"import torch\ntorch.set_num_threads(1)\ntorch.{mode}().__enter__()\n{SCRIPT}"
    folder = Path(__file__).resolve().parent.parent
    ran = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    last = ran.stdout.rpartition("\n")[2]
    assert ran.returncode == 0 and ran.stdout.endswith("done\n"), f"{last}\n{ran.stderr[-2000:]}"
