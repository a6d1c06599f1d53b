"""Several checkpoints as one: the mean of the logits of their networks (`src.models.Ensemble`).

Command: python -m src.ensemble models/a.pt models/b.pt models/c.pt --out models/ensemble.pt

The new checkpoint holds the networks and how each was trained. It goes where theirs go:
main_compare.py --model ensemble=models/ensemble.pt attacks and certifies it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from src.checkpoints import load_checkpoint, save_checkpoint
from src.command_line import Parser, run
from src.files import check_target
from src.models import Ensemble
from src.provenance import provenance


def main(argv=None):
    args = option_parser().parse_args(argv)
    out = Path(args.out)
    if len(args.checkpoints) < 2:
        raise ValueError("One checkpoint is no ensemble; give two or more.")
    if any(out.exists() and out.samefile(path) for path in args.checkpoints if Path(path).exists()):
        raise ValueError(f"--out {out} is one of the checkpoints; give it another name.")
    check_target(out)
    networks = [load_checkpoint(path) for path in args.checkpoints]
    save_checkpoint(out, Ensemble(networks), **common_facts(networks, args, argv))
    print(f"Saved {out}: the mean of the logits of {len(networks)} networks")
    print(f"To attack and certify it: python main_compare.py --model {out.stem}={out}")


def common_facts(networks: Sequence, args, argv) -> dict:
    """What made the ensemble, and the noise and the ball that all its members were trained for."""
    facts = [network.facts for network in networks]
    made = provenance("-m src.ensemble", args, argv) | shared(facts, "sigma", "epsilon")
    made["options"] |= shared([of.get("options", {}) for of in facts], "norm", "epsilon")
    return made


def shared(mappings: Sequence[Mapping], *names: str) -> dict:
    """The entries of these names that all mappings have alike."""
    first = mappings[0]
    return {
        name: first[name]
        for name in names
        if all(name in of and of[name] == first[name] for of in mappings)
    }


def option_parser():
    example = "python -m src.ensemble models/a.pt models/b.pt --out models/ensemble.pt"
    parser = Parser(usage=example, description=__doc__)
    add = parser.adder("data")
    add("checkpoints", nargs="+", metavar="FILE", help="checkpoints of the members, two or more")
    parser.adder("output")("--out", required=True, metavar="FILE", help="checkpoint to write")
    parser.set_defaults(device="cpu")
    return parser


if __name__ == "__main__":
    run(main)
