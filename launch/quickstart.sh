#!/usr/bin/env bash
# From a fresh clone to a small MobileLLM that has been trained on real text, exported to a Hugging
# Face directory and loaded back from it to speak. Run again, it picks up where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

install ""

run=runs/quickstart
.venv/bin/mobilellm train --config=configs/quickstart.py --workdir="$run"
rm -rf "$run/hf" # of an earlier start; export does not overwrite
.venv/bin/mobilellm export --checkpoint="$run" --format=hf --output="$run/hf"

for prompt in "Return a list of" "Raised when"; do
  echo
  .venv/bin/mobilellm generate --checkpoint="$run/hf" --prompt="$prompt" \
    --max_new_tokens=60 --temperature=0.7 --top_p=0.9
done

cat <<END

The run is in $run (config, metrics.jsonl, loss.png, checkpoints), the export in $run/hf. Next:

  .venv/bin/mobilellm generate --checkpoint=$run
  .venv/bin/mobilellm evaluate --checkpoint=$run --perplexity=README.md
  .venv/bin/mobilellm train --config=configs/quickstart.py --workdir=$run --config.train.steps=2000
  .venv/bin/mobilellm --help
END
