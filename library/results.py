"""What a run leaves behind: embedding files with their metadata, and the closing words to the user."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from library.architectures import SD2
from library.base_model import BaseModel
from library.dataset import TrainingData
from library.embedding_files import SAVE_DTYPES, write_embedding
from library.metadata import TrainedFor, TrainingRecord, modelspec_metadata
from library.model_family import ModelFamily
from library.new_word import NewWord
from library.optimizers import OptimizerChoice
from library.options import Options
from library.report import movement_table, movement_warning, movements, usage_card

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """Writes a run's files into ``--output_dir`` and reports on the last one.

    ``folder`` is where the files go; ``metadata`` holds the ModelSpec keys that all of them share.
    """

    folder: Path
    options: Options
    family: ModelFamily
    model: BaseModel
    word: NewWord
    seed: int
    metadata: dict[str, str]

    @classmethod
    def create(
        cls, options: Options, family: ModelFamily, model: BaseModel, word: NewWord, data: TrainingData
    ) -> "Results":
        """Collect what is known before the training. Raises UserError for metadata that cannot be written."""
        # A folder says itself what it is, whether --v2 is given or not.
        base = replace(options.model, v2=model.architecture is SD2)
        trained_for = TrainedFor(
            architecture=family.modelspec_architecture(base),
            prediction_type="v_prediction" if options.model.v_parameterization else "epsilon",
            resolution=data.resolution,
            min_timestep=options.noise.min_timestep,
            max_timestep=options.noise.max_timestep,
            clip_skip=options.model.clip_skip,
        )
        metadata = modelspec_metadata(options.metadata, trained_for, options.save.output_name)
        return cls(Path(options.save.output_dir), options, family, model, word, data.seed, metadata)

    def path(self, name: str) -> Path:
        """Where the file ``name`` is or will be."""
        return self.folder / name

    def write(self, name: str, rows: Sequence[Tensor], step: int, epoch: int, choice: OptimizerChoice) -> None:
        """Write rows [N, D], one tensor per text encoder, as they are after ``step`` steps in ``epoch`` (from 1).

        ``choice`` is the optimizer that trained them.
        """
        record = TrainingRecord(
            token=self.word.placeholder.text,
            num_vectors=self.word.placeholder.count,
            steps=step,
            epoch=epoch,
            init_word=None if self.options.token.weights else self.options.token.init_word,
            base_model=self.model.name,
            base_model_hash=self.model.hash(),
            seed=self.seed,
            learning_rate=choice.rates_text,
            optimizer=choice.description,
        )
        write_embedding(
            self.path(name),
            dict(zip(self.family.embedding_keys, rows, strict=True)),
            record,
            dtype=SAVE_DTYPES.get(self.options.save.save_precision),
            metadata=self.metadata,
        )

    def report(
        self, path: Path, starts: Sequence[Tensor], rows: Sequence[Tensor], steps: int, learning_rate: float | None
    ) -> None:
        """Print where the file is, how far each vector moved from its start, and how to use the file."""
        print(f"\nThe embedding is in {path}\n")
        moved = []
        for key, start, now in zip(self.family.embedding_keys, starts, rows, strict=True):
            compared = movements(self.word.placeholder.names, start, now)
            if len(self.family.embedding_keys) > 1:
                print(f"{key}:")
            print(movement_table(compared) + "\n")
            moved += compared
        if warning := movement_warning(moved, learning_rate, steps):
            logger.warning(warning)
        keys, count = self.family.embedding_keys, self.word.placeholder.count
        print(usage_card(path, self.word.placeholder.text, keys, count, self.model.architecture.title))
