"""What a base model says about the objective it was trained with, and the options that follow from it."""

import logging
from dataclasses import dataclass, replace

from library.model.architectures import SD1, SD2
from library.model.diffusers_folder import ModelFolder
from library.model.identity import read_config
from library.model.single_file import SingleFile
from library.options.options import Options
from library.support.errors import UserError

logger = logging.getLogger(__name__)

_SAID = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
# Files of SD 2 say nothing, but training for v-prediction left this tensor with wider values.
_TELLING = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_WIDE = 0.09


@dataclass(frozen=True)
class Objective:
    """``prediction_type`` is "epsilon", "v_prediction" or, where the model says nothing, None.

    ``noise_is_usual`` tells that nearly all models of its kind predict noise, whatever it says itself.
    """

    prediction_type: str | None
    zero_terminal_snr: bool = False
    noise_is_usual: bool = False


def objective_of(source: SingleFile | ModelFolder) -> Objective:
    """Read a folder's scheduler, or a file's markers, metadata and (SD 2) one small tensor."""
    if isinstance(source, ModelFolder):
        scheduler = read_config(source.path / "scheduler" / "scheduler_config.json") or {}
        said = scheduler.get("prediction_type")
        return Objective(
            _SAID.get(said) if isinstance(said, str) else None, scheduler.get("rescale_betas_zero_snr") is True
        )
    weights = source.weights
    zero_terminal_snr = "ztsnr" in weights.shapes
    if "v_pred" in weights.shapes:  # empty tensors by which such models of SDXL mark themselves
        return Objective("v_prediction", zero_terminal_snr)
    said = _SAID.get(weights.metadata.get("modelspec.prediction_type", ""))
    if said is None and source.architecture is SD2 and _TELLING in weights.shapes:
        spread = weights.read([_TELLING])[_TELLING].float().std(correction=0).item()
        if spread > 0:
            said = "v_prediction" if spread > _WIDE else "epsilon"
    return Objective(said, zero_terminal_snr, noise_is_usual=source.architecture is SD1)


def followed(options: Options, said: Objective, name: str) -> Options:
    """The options with --v_parameterization and --zero_terminal_snr decided: as given, else as the model says.

    Says what is taken from the model, and warns where given options contradict it. Raises UserError where what the
    model says rules out another option.
    """
    given_v, given_zero = options.model.v_parameterization, options.noise.zero_terminal_snr
    says_v = said.prediction_type == "v_prediction"
    v = says_v if given_v is None else given_v
    zero = (said.zero_terminal_snr and v) if given_zero is None else given_zero
    taken = ["--v_parameterization"] * (v and given_v is None) + ["--zero_terminal_snr"] * (zero and given_zero is None)
    if taken:
        logger.info(
            "%s says that it was trained this way, so it is: %s. With %s=false it is not.",
            name, " ".join(taken), taken[0],
        )  # fmt: skip
    if options.loss.v_pred_like_loss is not None and v:
        raise UserError(
            f"--v_pred_like_loss is for models that predict noise, and {name} predicts v. Leave --v_pred_like_loss out."
        )
    if given_zero and not v and given_v is None:
        logger.warning(
            "--zero_terminal_snr without --v_parameterization: a model that predicts noise learns nothing from pure "
            "noise. The results may be unexpected."
        )
    _warn_of_contradiction(options, said, name)
    return replace(
        options,
        model=replace(options.model, v_parameterization=v),
        noise=replace(options.noise, zero_terminal_snr=zero),
    )


def _warn_of_contradiction(options: Options, said: Objective, name: str) -> None:
    given_v, given_zero = options.model.v_parameterization, options.noise.zero_terminal_snr
    if said.prediction_type is None:
        if given_v and said.noise_is_usual:
            logger.warning(
                "--v_parameterization: nearly all models of Stable Diffusion 1.x predict noise, and %s does not say "
                "that it is another kind. Leave --v_parameterization out unless the model's page asks for it.",
                name,
            )
        return
    says_v = said.prediction_type == "v_prediction"
    differs = given_v is not None and given_v != says_v
    lacks_zero = said.zero_terminal_snr and given_zero is False
    if not differs and not lacks_zero:
        return
    if says_v:
        cure = "add --v_parameterization" + " --zero_terminal_snr" * said.zero_terminal_snr
    else:
        cure = "leave --v_parameterization out"
    logger.warning(
        "%s says that it predicts %s%s, but the options say otherwise. The embedding will be wrong unless you %s.",
        name, "v" if says_v else "noise (epsilon)", " with zero terminal SNR" * said.zero_terminal_snr, cure,
    )  # fmt: skip
