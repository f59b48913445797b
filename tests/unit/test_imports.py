"""Agents and the control plane import neither torch nor transformers: they start in a second."""

import subprocess
import sys

import pytest

CONTROL_PLANE = [
    "uellm.client",
    "uellm.cli.app",
    "uellm.cli.demo",
    "uellm.mesh.mesh",
    "uellm.models.files",
    "uellm.models.profile",
    "uellm.models.tokenizer",
    "uellm.policy.registry",
    "uellm.prediction.prior",
    "uellm_gateway.app",
    "uellm_profiler.app",
    "uellm_scheduler.app",
    "uellm_deployer.app",
    "uellm_worker.app",
    "uellm_worker.children",
]


@pytest.mark.parametrize("module", CONTROL_PLANE)
def test_without_model_libraries(module: str) -> None:
    program = (
        f"import sys, {module}; "
        "print(sorted({'torch', 'transformers', 'accelerate', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
