"""The sample's shards, as the script writes them, and a run on them."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
from test_main import ENVIRONMENT, SCRIPT, val_losses

import train_gpt


def test_sample_shards_and_preset(tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(SCRIPT.parent / "data" / "sample.py", tmp_path / "data")
    done = subprocess.run([sys.executable, str(tmp_path / "data" / "sample.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder, documents = tmp_path / "data" / "sample", {}
    assert sorted(path.name for path in folder.iterdir()) == ["sample_train_000001.bin", "sample_train_000002.bin", "sample_val_000000.bin"]
    for path in folder.iterdir():
        tokens = train_gpt.read_shard(str(path), vocab_size=257)
        starts = np.flatnonzero(tokens == 256)
        assert starts[0] == 0
        documents[path.name] = [bytes(piece[1:].astype(np.uint8)) for piece in np.split(tokens, starts[1:])]
    train, val = documents["sample_train_000001.bin"], documents["sample_val_000000.bin"]
    assert len(train) == 1500 and train != documents["sample_train_000002.bin"] and not set(train) & set(val)
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py"):  # whole source files, each on one side
        assert ((library / name).read_bytes() in set(train) | set(documents["sample_train_000002.bin"])) != ((library / name).read_bytes() in val)

    flags = ["--preset=sample", "--num_scheduled_iterations=6", "--num_extension_iterations=0", "--val_tokens=8192", "--warmup_steps=0"]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    losses = val_losses(done.stdout)
    assert done.returncode == 0 and losses[0] == 5.9506 and losses[-1] < 4.5
    assert re.search(r"^log: logs/", done.stdout, re.M)
