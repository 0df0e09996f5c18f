"""PyTorch, each time as the first call of a fresh process: compile, export, the module.

Run with the Python of an environment that has only what an extra of the package installs:
``python .ci/smoke_torch.py``. Prints what ran; exits with 1 if anything failed.
"""

import subprocess
import sys

START = """
import torch
import mml_arrayapi as mml

x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
expected = torch.nn.functional.multi_margin_loss(x, y)


def check(value):
    torch.testing.assert_close(value, expected)
"""
FIRST_CALLS = {
    "compile": """
check(torch.compile(mml.multi_margin_loss, fullgraph=True)(x, y))
""",
    "compile, backward": """
scores = x.clone().requires_grad_()
loss = torch.compile(mml.multi_margin_loss, fullgraph=True)(scores, y)
loss.backward()
check(loss.detach())
other = x.clone().requires_grad_()
torch.nn.functional.multi_margin_loss(other, y).backward()
torch.testing.assert_close(scores.grad, other.grad)
""",
    "export": """
class Model(torch.nn.Module):
    def forward(self, x, y):
        return mml.multi_margin_loss(x, y)

check(torch.export.export(Model(), (x, y), strict={strict}).module()(x, y))
""",
    "module": """
from mml_arrayapi.pytorch import MultiMarginLoss

check(MultiMarginLoss()(x, y))
""",
    "module, compile": """
from mml_arrayapi.pytorch import MultiMarginLoss

check(torch.compile(MultiMarginLoss(), fullgraph=True)(x, y))
""",
}


def main() -> int:
    """Run each first call in a process of its own."""
    programs = dict(FIRST_CALLS)
    export = programs.pop("export")
    programs |= {
        f"export, strict={strict}": export.format(strict=strict) for strict in (True, False)
    }
    failed = 0
    for name, program in programs.items():
        done = subprocess.run(
            [sys.executable, "-c", START + program], capture_output=True, text=True, check=False
        )
        print(f"{name:24} {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode:
            failed += 1
            print(done.stdout, done.stderr, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
