"""The active party: it holds the labels and the network above the embeddings, and says what is forgotten."""

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import load_file

from overhaul.files import write_json
from overhaul.forget.vertical import Unlearning, unlearn
from overhaul.models import open_model, save
from overhaul.parties import ActiveParty, Federation, Rates

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Forget one label, then let every party save its part."""
    config = context.run_config
    top, labels = open_model(config["top"])[0], load_file(config["labels"])["labels"]
    rates = Rates(*(float(config[name]) for name in ("lr", "momentum", "weight-decay", "clip")))
    federation = Federation.of(grid, int(config["parties"]), float(config["timeout"]))
    active = ActiveParty(top, labels, federation, rates)
    torch.manual_seed(int(config["seed"]))
    objective = Unlearning(top, torch.tensor([int(config["forget"])]))
    going, ids = labels == int(config["forget"]), torch.arange(len(labels))
    curves = unlearn(
        active, ids[going], ids[~going], objective,
        epochs=int(config["epochs"]), batch_size=int(config["batch-size"]), limit=1 / top.config.widths[-1],
    )  # fmt: skip
    federation.save(active.held)
    save(top, None, config["into"])
    crossed = [
        {"round": m.round, "phase": m.phase, "party": m.party, "ids": m.ids.tolist(), "values": list(m.values.shape)}
        for m in federation.recorded
    ]
    write_json(Path(config["into"]) / "run.json", {"curves": curves, "crossed": crossed})
