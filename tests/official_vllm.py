"""Scores with vLLM's V2 model runner, which needs Triton, and so a GPU: here its kernels run in
Triton's interpreter. With a GPU nothing is interpreted. Prints JSON.
"""

import json
import os
import sys
import types
from contextlib import closing
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    # vLLM's CPU build looks for a CPU backend, which the usual build of Triton lacks.
    driver = types.SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)

from test_scoring import IDS, LONGEST, contexts, scored

from pact_offline.scoring.backends import make_scorer
from pact_offline.settings.stages import ScoreSettings

settings = ScoreSettings(dtype="float32", batch_tokens=256)
with closing(make_scorer("vllm", Path(sys.argv[1]), IDS, LONGEST, settings)) as scorer:
    found = scored(scorer, contexts())
    values = [found[index].tolist() for index in range(len(contexts()))]
    print(json.dumps({"how": scorer.how, "values": values}), flush=True)
os._exit(0)  # vLLM's threads may abort a process that ends by itself
