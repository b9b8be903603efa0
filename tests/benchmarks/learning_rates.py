"""What each learning rate reaches in as many steps, on the quickstart: the table of docs/learning_rates.md.

python tests/benchmarks/learning_rates.py [--model sdxl]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RATES = ("1e-6", "1e-5", "1e-4", "5e-4", "5e-3")
SCRIPTS = {"sd": "train_textual_inversion.py", "sdxl": "sdxl_train_textual_inversion.py"}


def reached(model: str, rate: str, optimizer: str) -> dict:
    """The learning report of the quickstart at one rate."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, SCRIPTS[model], f"--config_file=configs/quickstart/{model}.toml"]
        command += [f"--learning_rate={rate}", f"--optimizer_type={optimizer}", f"--output_dir={folder}"]
        # The optimizer's own settings, not those of the quickstart.
        command += ["--lr_scheduler=constant", "--normalize_sample_gradients=false", "--optimizer_args"]
        command += ["--max_train_steps=300", "--learning_report"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        return json.loads((Path(folder) / "mychar_report.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the distance that each learning rate reaches.")
    parser.add_argument("--model", choices=tuple(SCRIPTS), default="sd")
    parser.add_argument("--optimizer", default="AdamW8bit")
    options = parser.parse_args()
    print(f"{'rate':>6}  {'distance':>8}  {'of the init word':>16}  {'loss':>8}")
    for rate in RATES:
        report = reached(options.model, rate, options.optimizer)
        before, after = report["before"], report["after"]
        share = after["distance"] / before["distance"]
        print(f"{rate:>6}  {after['distance']:>8.1f}  {share:>16.2f}  {after['loss']:>8.4f}", flush=True)


if __name__ == "__main__":
    main()
