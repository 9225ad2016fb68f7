"""The command line as one of two processes that share a policy's weights, without a GPU.

Accelerate shards (FSDP 2) only where it knows an accelerator, though torch does on a CPU too.
"""

from typing import Any

from accelerate.state import DistributedType, PartialState

from pact_offline.cli import main
from pact_offline.training.trainer import PactTrainer

started, train = PartialState.__init__, PactTrainer.train


def as_if_on_an_accelerator(self: Any, *args: Any, **kwargs: Any) -> None:
    started(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU


def told(self: Any, *args: Any, **kwargs: Any) -> Any:
    found = train(self, *args, **kwargs)
    print(type(self.model_wrapped).__name__, flush=True)
    return found


if __name__ == "__main__":
    PartialState.__init__ = as_if_on_an_accelerator
    PactTrainer.train = told  # type: ignore[method-assign]
    main()
