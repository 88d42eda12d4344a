"""auto-round: weights in 4 bits in groups of 64, saved and read again by transformers.

It rounds without training (`iters=0`), with statistics of the texts that are evaluated; its own
calibration text would be downloaded.
"""

from pathlib import Path

import torch
from auto_round import AutoRound
from protocol import Request, load, with_transformers
from transformers import AutoTokenizer

request = Request.read()
folder = Path(request.work) / "w4a16"
length = min(len(ids) for ids in request.windows)
rounding = AutoRound(
    load(request.folder), AutoTokenizer.from_pretrained(request.folder), scheme="W4A16",
    group_size=64, iters=0, device_map="cpu", seqlen=length, nsamples=len(request.windows),
    dataset=[torch.tensor([ids[:length]]) for ids in request.windows],
)  # fmt: skip
rounding.quantize_and_save(str(folder), format="auto_round")
saved = next(path.parent for path in folder.rglob("config.json"))
request.report("4 bits", **with_transformers(load(saved, device_map="cpu"), request))
