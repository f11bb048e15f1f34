#!/usr/bin/env bash
# Trains a small MobileLLM on real text, exports it as a Hugging Face directory, loads that directory
# and generates text. If you run the script again, it resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

install report

run=runs/quickstart
.venv/bin/mobilellm train --config=configs/quickstart.py --workdir="$run"
rm -rf "$run/hf" # export does not overwrite an earlier export
.venv/bin/mobilellm export --checkpoint="$run" --format=hf --output="$run/hf"

for prompt in "Return a list of" "Raised when"; do
  echo
  .venv/bin/mobilellm generate --checkpoint="$run/hf" --prompt="$prompt" \
    --max_new_tokens=60 --temperature=0.7 --top_p=0.9
done

cat <<END

The run is in $run (config, metrics.jsonl, loss.png, checkpoints), and the export is in $run/hf.
Try next:

  .venv/bin/mobilellm generate --checkpoint=$run
  .venv/bin/mobilellm evaluate --checkpoint=$run --perplexity=README.md
  .venv/bin/mobilellm train --config=configs/quickstart.py --workdir=$run --config.train.steps=2000
  .venv/bin/mobilellm --help
END
