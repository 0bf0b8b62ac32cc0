"""Under torch.distributed: layers and tied kernels on two processes, and a sharded model that is converted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

from .parallel import computes_in_shards

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)

_TRAIN = """
import os, sys, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {root!r})
from freezehooks import MaskedOptimizer, freeze_entries
from freezehooks.layers import MaskedConv2d, SharedKernelConv2d, SynthesizedConv2d

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.masked = MaskedConv2d(2, 4, 3, padding=1, mask="cross", bias_at="response")
        self.shared = SharedKernelConv2d(4, 3, padding=1)
        self.tied = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.synthesized = SynthesizedConv2d(nn.Linear(3, 8), 4, 2, kernel_size=1, bias=False)

    def forward(self, x, code):
        return self.synthesized(self.tied(self.shared(torch.tanh(self.masked(x)))), code)

dist.init_process_group("gloo")
torch.manual_seed(0)
net = Net()
rules = ["tied = tied(0, start=mean)", "tied.bias = tied(0, start=mean)", "masked.weight[0, 0, 1, 1] = 0.25"]
frozen = freeze_entries(net, rules)
model = DistributedDataParallel(net)
optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1), frozen)
generator = torch.Generator().manual_seed(dist.get_rank())
for _ in range(4):
    optimizer.zero_grad()
    images, codes = torch.randn(3, 2, 5, 5, generator=generator), torch.randn(3, 3, generator=generator)
    model(images, codes).square().sum().backward()
    optimizer.step()
    frozen.assert_frozen(guarded=False)
    assert not net.masked.weight[1:][~net.masked.mask[1:]].any()
    assert torch.equal(net.tied.weight[0], net.tied.weight[3])
for name, parameter in net.named_parameters():
    both = [torch.empty_like(parameter) for _ in range(2)]
    dist.all_gather(both, parameter.detach().contiguous())
    assert torch.equal(*both), name
open(os.path.join(os.path.dirname(__file__), f"rank {{dist.get_rank()}} held"), "w").close()
dist.barrier()
os._exit(0)  # the threads of gloo now and then abort the interpreter on its way out, after all was said
"""


def test_layers_and_ties_hold_and_agree_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(_TRAIN.format(root=str(Path(__file__).parents[1])))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank 0 held", "rank 1 held"]


_CONVERT = """
import os, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from freezehooks import freeze_entries

dist.init_process_group("gloo")
model = nn.Sequential(nn.Linear(4, 4))
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
frozen = freeze_entries(model, "0.weight[0] = 1")
model(torch.ones(1, 4)).sum().backward()
model.to(torch.float64)
frozen.assert_frozen(guarded=False)
print("held", flush=True)
os._exit(0)
"""


@computes_in_shards
def test_a_spread_model_is_converted_after_a_forward() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", sys.executable]
    done = subprocess.run(
        [*launcher, "-c", _CONVERT], capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[1]
    )
    assert "held" in done.stdout, done.stderr[-3000:]
