"""The comparison of several models: attacks, certificates, tables and figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch.utils.data import TensorDataset

from src.checkpoints import load_checkpoint, weights_digest
from src.files import check_target, drop_equal_copies, set_aside
from src.models import ConvNN, SmoothClassifier
from src.optimisation.processes import is_main
from src.provenance import from_repository
from src.records.certify import certify_dataset
from src.records.merging import merge
from src.records.rows import read_rows, shown_radius
from src.reports.output import Output, save_attacks
from src.reports.plotting import (
    plain_text,
    plot_certified_accuracy,
    plot_gallery,
    plot_p_lower,
)
from src.reports.tables import attack_comparison, certificate_lines, population_lines, round_down
from src.robustness.challenge import broken_allowed, challenge_certificates
from src.robustness.checklist import warning_lines
from src.robustness.evaluation import attack_evaluation
from src.robustness.fixed_radii import radii_with
from src.training_and_evaluation import accuracy
from src.utils import subset

# Model, in the order of the tables -> its checkpoint and the script that makes it.
MODELS = {
    "standard": ("standard_training", "main_training.py"),
    "adversarial": ("adversarial_training", "main_adv_training.py"),
    "smoothed": ("randomized_smoothing", "main_random_smoothing.py"),
}
# Each has a colour of its own in the figures.
MOST_MODELS = 8
# For models that were trained without noise.
SIGMA = 0.5
_TABLES = ("attacks", "smallest_epsilons")


def default_files(
    folder: str | Path, chosen: Mapping[str, str | Path | None] | None = None
) -> dict[str, Path]:
    """The files of the three models: those `chosen`, else the default ones in `folder`."""
    return {
        name: Path((chosen or {}).get(name) or Path(folder) / f"{stem}.pt")
        for name, (stem, _) in MODELS.items()
    }


def load_models(files: Mapping[str, str | Path], device) -> dict[str, ConvNN]:
    """The models of checkpoints, by the same names.

    Raises:
        FileNotFoundError: if a file is missing; the message names the script that makes it.
        ValueError: if a file is damaged.
    """
    scripts = {f"{stem}.pt": f"; run python {script} first" for stem, script in MODELS.values()}
    for path in map(Path, files.values()):
        if not path.exists():
            advice = scripts.get(path.name, "")
            raise FileNotFoundError(f"There is no checkpoint {path}{advice}.")
    return {name: load_checkpoint(path, device) for name, path in files.items()}


def checkpoint_facts(files: Mapping[str, str | Path], models: Mapping[str, ConvNN]) -> dict:
    """What results say of the models: {name: file and digest of the weights}."""
    return {
        name: {
            "file": from_repository(files[name]),
            "digest": weights_digest(model.state_dict()),
        }
        for name, model in models.items()
    }


def common_sigma(models: Mapping[str, ConvNN]) -> float:
    """The sigma of the first model whose checkpoint records one, else SIGMA."""
    sigmas = [model.facts["sigma"] for model in models.values() if "sigma" in model.facts]
    return sigmas[0] if sigmas else SIGMA


def attack_models(
    models: Mapping[str, ConvNN], test: TensorDataset, indices: Sequence[int], *, steps: int
) -> dict[str, dict[str, list[dict]]]:
    """`attack_evaluation` of each model on the same images; returns {model: evaluation}.

    The table also has the balls that the models were trained against. The smoothed model is
    attacked as its base network: these attacks do not see the noise.
    """
    options = [model.facts.get("options", {}) for model in models.values()]
    balls = [(o["norm"], o["epsilon"]) for o in options if {"norm", "epsilon"} <= o.keys()]
    evaluations, radii = {}, radii_with(*balls)
    for name, model in models.items():
        print(f"Attacking {name} on {len(indices)} test images")
        found = attack_evaluation(model, test, indices, indices, steps=steps, radii=radii)
        evaluations[name] = found
        print(warning_lines(found["warnings"]))
    return evaluations


def certify_models(
    models: Mapping[str, ConvNN],
    test: TensorDataset,
    indices: Sequence[int],
    results: str | Path,
    *,
    sigma: float,
    precision: str | None,
    facts: Mapping,
    shard: tuple[int, int] = (1, 1),
    **settings,
) -> dict[str, list[dict]]:
    """Certify each model, smoothed with the same noise, on the same images.

    Rows go to results/certificates_<model>.csv as they are finished. Returns {model: rows}.

    Args:
        models, test, indices: name -> network; the test set; the images in it to certify.
        results: folder of the rows.
        sigma, precision: noise in pixel units, and precision of the votes.
        facts: what is worth knowing of the run, JSON values.
        shard: (k, n) certifies the k-th of n parts of the images. If n > 1, the file names end in
            .shard-k-of-n.csv.
        settings: `n0`, `n`, `alpha`, `seed` and `resume` of `certify_dataset`.
    """
    print(f"Certifying at sigma = {sigma:g}, n = {settings['n']:,}, alpha = {settings['alpha']:g}")
    rows = {}
    for name, model in models.items():
        smooth = SmoothClassifier(model, sigma, precision=precision)
        clean, in_floats = (
            accuracy(model.inference_form(form), test) for form in (smooth.precision, "float32")
        )
        trained = getattr(model, "facts", {}).get("sigma", sigma)
        note = f", trained at sigma = {trained:g}" if trained != sigma else ""
        print(
            f"Certifying {name}, {clean:.2%} correct on clean images "
            f"({smooth.precision}; float32: {in_floats:.2%}){note}"
        )
        rows[name] = certify_dataset(
            smooth,
            test,
            certificates_path(results, name, shard),
            indices=indices,
            facts={**facts, "clean_accuracy": clean, "clean_accuracy_float32": in_floats},
            shard=shard,
            progress=is_main(),
            **settings,
        )
    return rows


def set_targets_aside(
    models: Iterable[str],
    results: Path,
    shard: tuple[int, int],
    *,
    tables: bool,
    resume: bool = False,
) -> None:
    """Rename earlier rows of the models or of this shard, and with `tables` the tables too.

    All are renamed at the start, so that an interrupted run leaves no rows of an earlier run to
    be resumed. With `resume` the certificates stay; the tables are always made anew.

    Raises:
        OSError: if a file cannot be written.
    """
    rows = [certificates_path(results, name, shard) for name in models]
    rows += [certificates_path(results, name) for name in models] if tables else []
    made_anew = [results / f"comparison_{table}.csv" for table in _TABLES] if tables else []
    for path in (*rows, *made_anew):
        check_target(path)
        check_target(path.with_suffix(".json"))
    for path in dict.fromkeys([*([] if resume else rows), *made_anew]):
        set_aside(path)


def merge_shards(models: Iterable[str], results: str | Path, parts: int) -> dict[str, list[dict]]:
    """Merge the certificates that `parts` processes made of each model; returns {model: rows}."""
    rows = {}
    for name in models:
        path = certificates_path(results, name)
        merge(path, _shards(results, name, parts))
        rows[name] = read_rows(path)
    return rows


def drop_shards(models: Iterable[str], results: str | Path, parts: int) -> None:
    """Delete the shards that `merge_shards` has merged."""
    for shard in (path for name in models for path in _shards(results, name, parts)):
        shard.unlink(missing_ok=True)
        shard.with_suffix(".json").unlink(missing_ok=True)


def _shards(results: str | Path, name: str, parts: int) -> list[Path]:
    return [certificates_path(results, name, (k + 1, parts)) for k in range(parts)]


def certificates_path(results: str | Path, name: str, shard: tuple[int, int] = (1, 1)) -> Path:
    """The file of a model's certificates, or of the k-th of n parts of them."""
    part = ".shard-{}-of-{}".format(*shard) if shard[1] > 1 else ""
    return Path(results) / f"certificates_{name}{part}.csv"


def challenge_models(
    models: Mapping[str, ConvNN],
    test: TensorDataset,
    certificates: Mapping[str, Sequence[Mapping]],
    *,
    sigma: float,
    precision: str,
    images: int,
    seed: int,
) -> None:
    """Attack the smoothed models within their certified radii and print how many fail.

    Raises:
        RuntimeError: if more certificates fail than their alpha explains.
    """
    excessive = []
    for name, rows in certificates.items():
        smooth = SmoothClassifier(models[name], sigma, precision=precision)
        broken, tried = challenge_certificates(smooth, test, rows, images=images, seed=seed)
        allowed = broken_allowed(tried, float(rows[0]["alpha"]))
        print(f"{name}: {broken} of {tried} certificates broken by attack; alpha allows {allowed}")
        if broken > allowed:
            excessive.append(name)
    if excessive:
        raise RuntimeError(
            f"More certificates of {', '.join(excessive)} were broken than alpha allows; "
            "something is wrong with the certificates."
        )


def report_comparison(
    evaluations: Mapping[str, Mapping[str, list[dict]]],
    certificates: Mapping[str, Sequence[Mapping]],
    test: TensorDataset,
    *,
    sigma: float,
    facts: Mapping,
    results: str | Path,
    figures: str | Path,
) -> None:
    """Print the tables, write the rows of the attacks and draw the figures.

    `evaluations` and `certificates` are those of `attack_models` and `certify_models`, `sigma` is
    in pixel units, `facts` go to the JSON beside the rows, `results` and `figures` are folders.
    """
    output = Output("comparison", "Comparison", facts, results, figures)
    tables = {name: found["table"] for name, found in evaluations.items()}
    print("\n" + attack_comparison(tables))
    save_attacks(evaluations, output, {})
    for table in _TABLES:
        drop_equal_copies(output.rows(f"{table}.csv"))
    radii = [step * sigma / 2 for step in range(7)]
    print("\n" + certificate_lines(certificates, radii))
    print("\n" + population_lines(certificates, radii[2::2]))
    clean = {name: table[0]["accuracy"] for name, table in tables.items()}
    first = next(iter(certificates.values()))
    setting = f"$\\sigma$ = {sigma:g}, {len(first)} test images, n = {int(first[0]['n']):,}"
    path, title = output.figure("certified_accuracy"), f"Certified accuracy: {setting}"
    plot_certified_accuracy(certificates, path, title, clean=clean)
    plot_p_lower(certificates, output.figure("p_lower"), f"Lower bounds: {setting}")
    title = f"Smallest and largest certified radii of correct predictions, $\\sigma$ = {sigma:g}"
    plot_gallery(*_extremes(certificates, test), output.figure("radii"), title)


def _extremes(certificates: Mapping[str, Sequence[Mapping]], test: TensorDataset, show: int = 8):
    """Images with the smallest and the largest certified radii: (rows, row labels)."""
    rows, labels = [], []
    for name, certified in certificates.items():
        standing = [row for row in certified if int(row["correct"])]
        standing.sort(key=shown_radius)
        for label, chosen in (("smallest", standing[:show]), ("largest", standing[-show:])):
            images = subset(test, [int(row["index"]) for row in chosen]).tensors[0]
            captions = [f"{r['prediction']}: r = {round_down(shown_radius(r), 2)}" for r in chosen]
            pairs = zip(images, captions, strict=True)
            rows.append([(image[0].numpy(), caption, "black") for image, caption in pairs])
            labels.append(f"{plain_text(name)}\n{label}")
    return rows, labels
