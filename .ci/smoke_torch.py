"""PyTorch, each time as the first call of a fresh process: compile, export, the module.

Run with the Python of an environment that has only what an extra of the package installs:
``python .ci/smoke_torch.py``. Prints what ran; exits with 1 if anything failed.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

START = """
import torch
import mml_arrayapi as mml

x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
expected = torch.nn.functional.multi_margin_loss(x, y)
OPERATOR = "mml_arrayapi.multi_margin_loss"


def check(value):
    torch.testing.assert_close(value, expected)


def compiled(function):
    def backend(module, inputs):
        assert OPERATOR in module.code, module.code
        return module.forward

    return torch.compile(function, fullgraph=True, backend=backend)
"""
EXPORT = """
class Model(torch.nn.Module):
    def forward(self, x, y):
        return mml.multi_margin_loss(x, y)

program = torch.export.export(Model(), (x, y), strict={strict})
assert OPERATOR in program.graph_module.code, program
check(program.module()(x, y))
"""
FIRST_CALLS = {
    "compile": """
check(compiled(mml.multi_margin_loss)(x, y))
""",
    "compile by Inductor, backward": """
scores = x.clone().requires_grad_()
loss = torch.compile(mml.multi_margin_loss, fullgraph=True)(scores, y)
loss.backward()
check(loss.detach())
other = x.clone().requires_grad_()
torch.nn.functional.multi_margin_loss(other, y).backward()
torch.testing.assert_close(scores.grad, other.grad)
""",
    "export, strict": EXPORT.format(strict=True),
    "export, not strict": EXPORT.format(strict=False),
    "module": """
from mml_arrayapi.pytorch import MultiMarginLoss

check(MultiMarginLoss()(x, y))
""",
    "module, compile": """
from mml_arrayapi.pytorch import MultiMarginLoss

check(compiled(MultiMarginLoss())(x, y))
""",
}


def run(program: str) -> str:
    """Run a program in a process of its own; return what it said if it failed."""
    done = subprocess.run(
        [sys.executable, "-c", START + program], capture_output=True, text=True, check=False
    )
    return f"FAILED\n{done.stdout}\n{done.stderr}" if done.returncode else "ok"


def main() -> int:
    """Run each first call."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(run, FIRST_CALLS.values()))
    for name, result in zip(FIRST_CALLS, results, strict=True):
        print(f"{name:30} {result}", flush=True)
    return 0 if set(results) == {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
