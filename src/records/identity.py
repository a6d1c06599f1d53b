"""What tells one model from another in the twin of rows: its state, its class and its answers."""

import torch
from torch import Tensor, nn

from src.checkpoints import weights_digest
from src.checks import ask, check_function, checked_logits, evaluation_mode, rounding_unit
from src.engine.parts import members_of
from src.engine.untouched import is_untouched, unwrapped


def model_identity(model: nn.Module, images: Tensor, classes: int) -> dict:
    """The settings that name the base classifier of rows, JSON values.

    An unaltered ConvNN or Ensemble is its state and its arguments. Any other model is its state,
    its class (inside `DataParallel` and the like) and its `outputs`: hooks, a replaced method or an
    attribute such as a temperature show in no state.

    Args:
        model: images (B, C, H, W) -> logits (B, classes).
        images: images of the data set; only their shape and device count.
        classes: how many logits the model must have.

    Raises:
        ValueError: for other logits, or answers that change with the batch or from call to call.
    """
    network = unwrapped(model)
    identity = {"model_digest": weights_digest(network.state_dict())}
    if is_untouched(network):
        _check_classes(members_of(network)[0].output.out_features, classes)
        return identity | {"network": network.config}
    kind, shape = type(network), images.shape[1:]
    device = next(model.parameters(), images).device
    return identity | {
        "model_class": f"{kind.__module__}.{kind.__qualname__}",
        "image_shape": list(shape),
        "outputs": _outputs(model, fixed_images(shape).to(device), classes),
    }


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor, classes: int) -> dict:
    """Logits of a few images, a line of text per image, and how far rounding may move them.

    A logit may differ by `relative` times itself plus `absolute`. Threads, batches, memory order
    and convolutions without oneDNN moved those of three deep networks by 2e-6 of their spread in
    float32 and 2e-2 in bfloat16; half the digits of the type (3e-4, 9e-2) are allowed.
    """
    check_function(model, images)
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), evaluation_mode(model):
        logits = checked_logits(ask(model, images), len(images), name="base_classifier")
    _check_classes(logits.shape[1], classes)
    # A network in bfloat16 may give its logits in float32.
    weights = (p for p in model.parameters() if p.is_floating_point())
    unit = max([rounding_unit(logits), *(torch.finfo(p.dtype).eps for p in weights)])
    digits = 17 if logits.dtype == torch.float64 else 9
    lines = [" ".join(f"{x:.{digits}g}" for x in row) for row in logits.double().tolist()]
    finite = logits.double().nan_to_num(0, 0, 0)
    spread = float((finite.amax(0) - finite.amin(0)).max())
    return {"logits": lines, "absolute": unit**0.5 * spread, "relative": 4 * unit}


def _check_classes(found: int, classes: int) -> None:
    if found != classes:
        raise ValueError(
            f"'base_classifier' returns {found} logits for each image; give "
            f"num_classes={found}, not {classes}, to the SmoothClassifier."
        )


def fixed_images(shape: tuple[int, ...]) -> Tensor:
    """Four images (4, *shape): two dotted ones, bright and dark, a ramp, and one beyond [0, 1].

    Votes see pixels beyond [0, 1] too. Multiples of the golden ratio stand in for random numbers,
    which may change from one release of torch to the next.
    """
    with torch.inference_mode(False):
        number = torch.arange(1, int(torch.Size(shape).numel()) + 1, dtype=torch.float64)
        dots, golden = number * 0.6180339887498949 % 1, number * number * 0.6180339887498949 % 1
        images = torch.stack([dots, dots / 2, number / len(number), golden * 2 - 0.5])
    return images.view(4, *shape).float()
