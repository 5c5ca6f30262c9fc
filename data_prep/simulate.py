"""A small simulated atlas: what the quickstart trains on when there is nothing but this repository.

In: a SimulationConfig. Out: a folder with, for each species, `<species>.h5ad` (raw counts in CSR, Census column
names) and `<species>_gene.h5` (protein vectors in the published layout), one `orthologs.tsv` (gene_id, species,
orthogroup), which only the oracle baseline and the tests may read, and `simulation.json`, which says what was
simulated. THIS IS A SIMULATION: it shows that the machine works and that the model can learn what was put in, and
says nothing about biology.

What is put in: most orthogroups are shared by all species under different gene ids, and the protein vectors of an
orthogroup are close; every species also has genes of its own. Cell types form a two-level tree (lineage, type), each
node with a program of moderately expressed genes; programs that have nothing to do with the type (cycle, stress, ...)
vary from cell to cell; a few housekeeping genes dominate the counts; donors and species shift every gene; counts are
negative binomial.

Shapes: C cells, G genes of a species, O orthogroups, P programs, E protein width.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from tftrain.cells.vocab import write_protein_table
from tftrain.errors import CellsError

NOTICE = "SIMULATED cells (data_prep/simulate.py): no measurement, no biological claim."
RECORD = "simulation.json"
"""File of the folder with the notice and the whole config."""

LINEAGES = {
    "epithelial": ("absorptive", "secretory", "ciliated"),
    "immune": ("lymphoid", "myeloid", "granular"),
    "stromal": ("fibroblast", "endothelial"),
}
"""The tree of cell types: lineage -> types."""

NUISANCE = ("cycle", "stress", "interferon", "hypoxia")
"""Programs that every cell runs to some degree, whatever its type."""

UNKNOWN_COLUMNS = ("development_stage", "disease", "sex", "tissue", "tissue_general")
"""Census columns that the simulation has no idea of."""


@dataclass(frozen=True)
class SpeciesConfig:
    """One simulated species."""

    name: str
    n_cells: int
    n_donors: int
    depth: float
    """Median counts of a cell."""
    composition: float = 4.0
    """Concentration of the Dirichlet that draws its cell-type shares: small is uneven."""


@dataclass(frozen=True)
class SimulationConfig:
    """Sizes and strengths of the simulation. Strengths are natural-log fold changes of a gene's expected share."""

    seed: int = 0
    species: tuple[SpeciesConfig, ...] = (
        SpeciesConfig("sim_alba", 2500, 30, 330.0),
        SpeciesConfig("sim_borealis", 2500, 30, 240.0),
        SpeciesConfig("sim_celata", 600, 6, 280.0),
    )
    n_orthogroups: int = 480
    n_own_genes: int = 60
    """Genes of each species that no other species has."""
    protein_width: int = 64
    n_housekeeping: int = 24
    genes_per_lineage: int = 32
    genes_per_type: int = 30
    genes_per_nuisance: int = 24
    family_size: int = 8
    """Orthogroups whose proteins resemble each other, whatever their programs."""
    program_base: float = -3.0
    """Mean log expected share of a tree program's gene where the program is silent; other genes: -1."""
    program_strength: float = 3.5
    nuisance_strength: float = 0.7
    donor_sd: float = 0.2
    species_sd: float = 0.5
    """Divergence of a gene's expression between species."""
    dispersion: float = 2.0
    """Negative-binomial size r: variance = mean + mean^2 / r."""
    family_share: float = 0.35
    """Share of a protein vector's variance that its family explains."""
    function_share: float = 0.08
    """Share that a gene's program explains: proteins of one program resemble each other weakly."""
    species_protein_noise: float = 0.06
    """Share of a protein vector's variance in which orthologs differ, gene by gene."""
    accent_share: float = 0.02
    """Size of the shift that all protein vectors of a species have in common, as a share of that variance."""


@dataclass(frozen=True)
class Orthogroups:
    """What all species share."""

    base_O: np.ndarray
    """float64 (O): log expected share before programs."""
    loading_PO: np.ndarray
    """float64 (P, O): log fold change of a gene at activity 1 of a program."""
    function_PE: np.ndarray
    """float64 (P, E): direction in protein space of each program."""
    protein_OE: np.ndarray


@dataclass(frozen=True)
class SpeciesGenes:
    """The genes of one species: its orthologs first, its own genes after them."""

    gene_id_G: np.ndarray
    orthogroup_G: np.ndarray
    """int64 (G): orthogroup, -1 for a gene of its own."""
    base_G: np.ndarray
    loading_PG: np.ndarray
    protein_GE: np.ndarray


@dataclass(frozen=True)
class Programs:
    """The programs of the simulation, in the order of `loading_PO`."""

    names: tuple[str, ...] = tuple(LINEAGES) + tuple(t for ts in LINEAGES.values() for t in ts) + NUISANCE
    types: tuple[str, ...] = tuple(t for ts in LINEAGES.values() for t in ts)
    lineage_of: dict[str, str] = field(default_factory=lambda: {t: n for n, ts in LINEAGES.items() for t in ts})

    def index(self, name: str) -> int:
        """Row of a program."""
        return self.names.index(name)


def simulate_atlas(out: str | Path, config: SimulationConfig | None = None) -> list[Path]:
    """Writes the atlas into `out` and returns the .h5ad files. The same config writes the same cells and vectors;
    where it did so before, nothing is written.

    Raises CellsError where `out` holds another simulation, and where the programs need more orthogroups than there are.
    """
    config, out = config or SimulationConfig(), Path(out)
    files = [out / f"{species.name}.h5ad" for species in config.species]
    record, wanted = out / RECORD, json.dumps({"notice": NOTICE, **asdict(config)}, indent=1) + "\n"
    if record.exists():
        if record.read_text() == wanted:
            return files
        raise CellsError(f"{out} holds another simulation, see {record}; remove that folder or name another one")
    out.mkdir(parents=True, exist_ok=True)
    programs = Programs()
    shared = draw_orthogroups(np.random.default_rng([config.seed, 0]), config, programs)
    orthologs = []
    for number, (species, file) in enumerate(zip(config.species, files), start=1):
        rng = np.random.default_rng([config.seed, number])
        genes = draw_genes(rng, config, number, shared)
        cells = draw_cells(rng, config, species, genes, programs)
        cells.write_h5ad(file, compression="lzf")
        write_protein_table(out / f"{species.name}_gene.h5", dict(zip(genes.gene_id_G.tolist(), genes.protein_GE)))
        orthologs.append(ortholog_table(species.name, genes))
    pd.concat(orthologs).to_csv(out / "orthologs.tsv", sep="\t", index=False)
    # Written last: a folder without it was not finished and is written again.
    record.write_text(wanted)
    return files


def ortholog_table(species: str, genes: SpeciesGenes) -> pd.DataFrame:
    """gene_id, species, orthogroup of the genes that other species have too."""
    has_ortholog_G = genes.orthogroup_G >= 0
    names = [f"OG{number:05d}" for number in genes.orthogroup_G[has_ortholog_G]]
    return pd.DataFrame({"gene_id": genes.gene_id_G[has_ortholog_G], "species": species, "orthogroup": names})


def draw_orthogroups(rng: np.random.Generator, config: SimulationConfig, programs: Programs) -> Orthogroups:
    """Expression, programs and protein vectors of the shared orthogroups; a gene belongs to at most one tree
    program."""
    sizes = [
        config.genes_per_nuisance
        if name in NUISANCE
        else config.genes_per_lineage
        if name in LINEAGES
        else config.genes_per_type
        for name in programs.names
    ]
    O, needed = config.n_orthogroups, sum(sizes) + config.n_housekeeping
    if needed > O:
        raise CellsError(f"simulation: n_orthogroups is {O}, the programs and housekeeping genes need {needed}")
    order_O = rng.permutation(O)
    base_O = rng.normal(-1.0, 0.9, O)
    housekeeping = order_O[: config.n_housekeeping]
    base_O[housekeeping] = rng.normal(2.6, 0.6, config.n_housekeeping)
    loading_PO = np.zeros((len(sizes), O))
    first = config.n_housekeeping
    for p, (name, size) in enumerate(zip(programs.names, sizes)):
        members = order_O[first : first + size]
        first += size
        strength = config.nuisance_strength if name in NUISANCE else config.program_strength
        loading_PO[p, members] = strength * rng.uniform(0.6, 1.4, size)
        base_O[members] = rng.normal(-1.0 if name in NUISANCE else config.program_base, 0.5, size)
    function_PE = rng.normal(size=(len(sizes), config.protein_width))
    return Orthogroups(base_O, loading_PO, function_PE, draw_proteins(rng, config, loading_PO, function_PE))


def draw_proteins(
    rng: np.random.Generator, config: SimulationConfig, loading_Pn: np.ndarray, function_PE: np.ndarray
) -> np.ndarray:
    """float64 (n, E), unit variance a coordinate: family, function and the gene's own part.

    Families are drawn without regard to programs, as most of a sequence is.
    """
    n, E = loading_Pn.shape[1], config.protein_width
    family_n = rng.integers(0, max(1, n // config.family_size), n)
    family_FE = rng.normal(size=(family_n.max() + 1, E))
    is_in_program_n = loading_Pn.max(0) > 0
    function_nE = np.where(is_in_program_n[:, None], function_PE[loading_Pn.argmax(0)], rng.normal(size=(n, E)))
    own_share = 1 - config.family_share - config.function_share
    parts = (
        (config.family_share, family_FE[family_n]),
        (config.function_share, function_nE),
        (own_share, rng.normal(size=(n, E))),
    )
    return sum(np.sqrt(share) * part_nE for share, part_nE in parts)


def draw_genes(rng: np.random.Generator, config: SimulationConfig, number: int, shared: Orthogroups) -> SpeciesGenes:
    """The genes of one species in an order of its own, under ids that no other species has."""
    O, n_own = config.n_orthogroups, config.n_own_genes
    G = O + n_own
    order_G = rng.permutation(G)
    orthogroup_G = np.concatenate([np.arange(O), np.full(n_own, -1)])
    base_G = np.concatenate([shared.base_O + rng.normal(0, config.species_sd, O), rng.normal(-1.0, 0.9, n_own)])
    own_PG = np.zeros((len(shared.loading_PO), n_own))
    own_PG[rng.integers(0, len(own_PG), n_own), np.arange(n_own)] = config.program_strength * rng.uniform(0, 1, n_own)
    loading_PG = np.concatenate([shared.loading_PO, own_PG], axis=1)
    noise_OE = rng.normal(size=shared.protein_OE.shape)
    q = config.species_protein_noise
    ortholog_OE = np.sqrt(1 - q) * shared.protein_OE + np.sqrt(q) * noise_OE
    protein_GE = np.concatenate([ortholog_OE, draw_proteins(rng, config, own_PG, shared.function_PE)])
    protein_GE += np.sqrt(config.accent_share) * rng.normal(size=config.protein_width)
    ids_G = np.array([f"SIM{number}G{i:08d}" for i in range(G)])
    return SpeciesGenes(
        ids_G, orthogroup_G[order_G], base_G[order_G], loading_PG[:, order_G], protein_GE[order_G].astype(np.float32)
    )


def draw_cells(
    rng: np.random.Generator,
    config: SimulationConfig,
    species: SpeciesConfig,
    genes: SpeciesGenes,
    programs: Programs,
) -> ad.AnnData:
    """Cells of one species: types by its composition, donors with batch effects, negative-binomial counts."""
    C, G, types = species.n_cells, len(genes.gene_id_G), programs.types
    share = rng.dirichlet(np.full(len(types), species.composition))
    share = 0.5 * share + 0.5 / len(types)
    type_C = rng.choice(len(types), C, p=share)
    donor_C = rng.integers(0, species.n_donors, C)
    activity_CP = draw_activities(rng, type_C, donor_C, species.n_donors, programs)
    donor_shift_DG = rng.normal(0, config.donor_sd, (species.n_donors, G))
    log_rate_CG = genes.base_G + activity_CP @ genes.loading_PG + donor_shift_DG[donor_C]
    rate_CG = np.exp(log_rate_CG)
    donor_depth_D = np.exp(rng.normal(0, 0.15, species.n_donors))
    depth_C = species.depth * donor_depth_D[donor_C] * np.exp(rng.normal(0, 0.3, C))
    mean_CG = depth_C[:, None] * rate_CG / rate_CG.sum(1, keepdims=True)
    r = config.dispersion
    counts_CG = rng.poisson(mean_CG * rng.gamma(r, 1 / r, (C, G)))
    names_C = np.array(types)[type_C]
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(names_C),
            "lineage": pd.Categorical([programs.lineage_of[name] for name in names_C]),
            "donor_id": pd.Categorical([f"{species.name}_d{d:02d}" for d in donor_C]),
            "assay": pd.Categorical(["simulated"] * C),
            "species": pd.Categorical([species.name] * C),
            "is_primary_data": True,
            "suspension_type": pd.Categorical(["cell"] * C),
            **{name: pd.Categorical(["unknown"] * C) for name in UNKNOWN_COLUMNS},
        },
        index=[f"{species.name}_{c:05d}" for c in range(C)],
    )
    var = pd.DataFrame({"ensembl_id": genes.gene_id_G, "feature_name": genes.gene_id_G}, index=genes.gene_id_G)
    uns = {"simulated": True, "notice": NOTICE, "seed": config.seed}
    return ad.AnnData(sp.csr_matrix(counts_CG, dtype=np.float32), obs=obs, var=var, uns=uns)


def draw_activities(
    rng: np.random.Generator, type_C: np.ndarray, donor_C: np.ndarray, n_donors: int, programs: Programs
) -> np.ndarray:
    """float64 (C, P): how strongly each cell runs each program; 1 is the program's full strength."""
    C, P, n_lineages, n_types = len(type_C), len(programs.names), len(LINEAGES), len(programs.types)
    activity_CP = np.abs(rng.normal(0, 0.15, (C, P)))
    lineage_T = np.array([programs.index(programs.lineage_of[name]) for name in programs.types])
    activity_CP[np.arange(C), lineage_T[type_C]] += rng.gamma(8, 1 / 8, C)
    activity_CP[np.arange(C), n_lineages + type_C] += rng.gamma(8, 1 / 8, C)
    donor_DP = rng.gamma(4, 1 / 4, (n_donors, len(NUISANCE)))
    nuisance_CP = rng.gamma(1.5, 0.45, (C, len(NUISANCE))) * donor_DP[donor_C]
    activity_CP[:, n_lineages + n_types :] += 2.5 * np.tanh(nuisance_CP / 2.5)
    return activity_CP
