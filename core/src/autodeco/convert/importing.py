"""The default body of the hook `import_weights`: the source itself, or an imported checkpoint."""

from __future__ import annotations

import dataclasses

from autodeco.convert.source import open_source
from autodeco.errors import UsageError
from autodeco.family import FamilySpec
from autodeco.hookspecs import ImportedWeights
from autodeco.job import Job
from autodeco.resolution import preset_of


def ready_weights(family: FamilySpec, job: Job) -> ImportedWeights:
    """Proves that the weight map is total, and imports the checkpoint if the job asks for it.

    Args:
        family: The plugin's data.
        job: With ``model`` and ``preset`` set, and ``import_dir`` if it asks for an import.

    Raises:
        WeightsError: The checkpoint does not fit, or the imported one is of another.
        UsageError: There is no place for the imported checkpoint.
        EnvironmentProblem: megatron-core is not installed, or nothing can be written.
    """
    weights = open_source(family, job)
    if job.import_format == "hf":
        return weights
    if job.import_dir is None:
        raise UsageError(
            "the job has no place for the imported checkpoint", fix="add --import-dir DIR"
        )
    from autodeco.engines.select import require_megatron

    require_megatron("--import-format torch_dist needs megatron-core, which is not installed")
    from autodeco.engines.megatron.importing import import_checkpoint

    architecture = family.architecture(preset_of(family, job).architecture)
    import_checkpoint(weights, architecture, job.import_dir)
    return dataclasses.replace(weights, format="torch_dist", distributed=job.import_dir)
