"""The `tftrain-data` command: builds stores, simulates an atlas, makes stand-in protein tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from tftrain import __version__
from tftrain.errors import CellsError, TftrainError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 something examined is wrong, 2 the input cannot be used, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except TftrainError as error:
        print(f"tftrain-data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tftrain-data: interrupted; the same command continues", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tftrain-data", description="Prepare cells and genes for tftrain.")
    parser.add_argument("--version", action="version", version=f"tftrain-data {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="h5ad files -> one SOMA store a species, in the CELLxGENE Census layout")
    build.set_defaults(run=_build)
    build.add_argument("out", metavar="OUT", help="folder: each species becomes OUT/<species>.soma")
    build.add_argument("files", nargs="+", metavar="FILE.h5ad", help="files with raw counts, or folders of them")
    species = build.add_mutually_exclusive_group()
    species.add_argument("--species", metavar="NAME", help="species of all files, such as homo_sapiens")
    species.add_argument("--species-from", metavar="COLUMN", help="obs column; default species, or else organism")
    build.add_argument(
        "--gene-col-name", metavar="COLUMN", help="var column of gene ids; default ensembl_id, or else the index"
    )
    build.add_argument(
        "--gene-table",
        action="append",
        default=[],
        metavar="[SPECIES=]TABLE",
        help="CSV or TSV of gene id and symbol (GENCODE): maps symbols to ids; once a species",
    )
    build.add_argument(
        "--sum-duplicates", action="store_true", help="add up columns whose gene ids differ in their version alone"
    )
    build.add_argument("--append", action="store_true", help="add the files that a store of OUT does not have yet")
    build.add_argument("--replace", action="store_true", help="build again where a store of other input stands")

    mirror = commands.add_parser("mirror", help="a filtered slice of the Census, or of any SOMA store -> a local store")
    mirror.set_defaults(run=_mirror)
    mirror.add_argument("out", metavar="OUT.soma", help="the local store")
    origin = mirror.add_mutually_exclusive_group(required=True)
    origin.add_argument("--census", metavar="VERSION", help="a build such as 2025-01-30, or stable or latest")
    origin.add_argument("--uri", help="folder or s3:// location of a SOMA experiment")
    mirror.add_argument("--organism", default="homo_sapiens", help="experiment of the Census; default %(default)s")
    mirror.add_argument("--filter", default="is_primary_data == True", help="cells to copy; default %(default)s")
    mirror.add_argument("--max-cells", type=int, metavar="N", help="the first N that match")
    mirror.add_argument("--region", help="of an s3:// store")
    mirror.add_argument("--endpoint", metavar="URL", help="of another S3 server than Amazon's")
    mirror.add_argument("--anonymous", action="store_true", help="ask a public bucket without signing")

    inspect = commands.add_parser("inspect", help="the data doctor: may training start on these .h5ad files?")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("files", nargs="+", metavar="FILE.h5ad", help="files, or folders of them")
    inspect.add_argument("--proteins", nargs="+", metavar="TABLE.h5", help="protein tables: the vocabulary")
    inspect.add_argument("--gene-table", action="append", default=[], metavar="SPECIES=TABLE", help="as in build")
    inspect.add_argument("--gene-col-name", metavar="COLUMN", help="as in build")
    inspect.add_argument("--genes-per-cell", type=int, default=2047, help="context length; default %(default)s")
    inspect.add_argument("--min-genes", type=int, default=200, help="data.qc.min_expressed_genes; default %(default)s")
    inspect.add_argument("--json", action="store_true", help="print a JSON list in place of a table")

    audit = commands.add_parser(
        "audit", help="prove from a run's ledger that every planned cell was trained exactly once"
    )
    audit.set_defaults(run=_audit)
    audit.add_argument("out", metavar="RUN", help="run folder (the recipe's `out`) of a run with data.ledger=true")
    audit.add_argument("--json", action="store_true", help="print one JSON object in place of text")

    simulate = commands.add_parser("simulate", help="a simulated atlas of three species, for trying things out")
    simulate.set_defaults(run=_simulate)
    simulate.add_argument("out", metavar="OUT", help="folder for .h5ad files, SOMA stores and protein tables")
    simulate.add_argument("--seed", type=int, default=0)

    stand_in = commands.add_parser(
        "stand-in", help="random protein vectors, close for orthologs, for trying things out"
    )
    stand_in.set_defaults(run=_stand_in)
    stand_in.add_argument("out", metavar="OUT", help="folder: each store becomes OUT/<store>_gene.h5")
    stand_in.add_argument("stores", nargs="+", metavar="STORE", help="SOMA stores whose genes get vectors")
    stand_in.add_argument(
        "--orthologs", metavar="TABLE", help="table with a header whose rows hold ids of orthologous genes"
    )
    stand_in.add_argument("--width", type=int, default=128, help="of a vector; default %(default)s")
    return parser


def _gene_tables(given: Sequence[str]) -> dict[str, str]:
    """Path by species, "" for every other, of `[SPECIES=]TABLE` arguments."""
    from data_prep.build import species_name

    tables: dict[str, str] = {}
    for argument in given:
        species, _, path = argument.rpartition("=")
        key = species_name(species) if species else ""
        if key in tables:
            raise CellsError(f"--gene-table is given twice for {key or 'every species'}")
        tables[key] = path
    return tables


def _build(arguments: argparse.Namespace) -> None:
    from data_prep.build import BuildConfig, build

    config = BuildConfig(
        species=arguments.species,
        species_column=arguments.species_from,
        gene_col_name=arguments.gene_col_name,
        gene_tables=_gene_tables(arguments.gene_table),
        sum_duplicates=arguments.sum_duplicates,
        replace=arguments.replace,
        append=arguments.append,
    )
    build(arguments.out, arguments.files, config)


def _mirror(arguments: argparse.Namespace) -> None:
    from data_prep.mirror import mirror
    from tftrain.cells.storage import CensusConfig, SourceConfig

    source = SourceConfig(
        uri=arguments.uri or "",
        species=arguments.organism,
        census=CensusConfig(arguments.census, arguments.organism) if arguments.census else None,
        region=arguments.region,
        endpoint=arguments.endpoint,
        anonymous=arguments.anonymous,
    )
    mirror(source, arguments.out, obs_filter=arguments.filter, max_cells=arguments.max_cells)


def _inspect(arguments: argparse.Namespace) -> int:
    from data_prep.build import h5ad_files
    from data_prep.doctor import inspect, show
    from data_prep.genes import GeneTable
    from tftrain.cells.vocab import Vocab

    vocab = Vocab.load(arguments.proteins) if arguments.proteins else None
    tables = {species: GeneTable.load(path) for species, path in _gene_tables(arguments.gene_table).items()}
    findings = [
        inspect(
            path,
            vocab=vocab,
            tables=tables,
            gene_col_name=arguments.gene_col_name,
            genes_per_cell=arguments.genes_per_cell,
            min_expressed_genes=arguments.min_genes,
        )
        for path in h5ad_files(arguments.files)
    ]
    if arguments.json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=1))
    else:
        show(findings)
    return 0 if all(finding.is_fit for finding in findings) else 1


def _audit(arguments: argparse.Namespace) -> int:
    from data_prep.audit import audit

    found = audit(arguments.out)
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(found), "is_proved": found.is_proved}))
    else:
        print("\n".join(found.lines()))
    return 0 if found.is_proved else 1


def _simulate(arguments: argparse.Namespace) -> None:
    from data_prep.build import build
    from data_prep.simulate import NOTICE, SimulationConfig, simulate_atlas

    print(NOTICE)
    files = simulate_atlas(arguments.out, SimulationConfig(seed=arguments.seed))
    build(arguments.out, files)


def _stand_in(arguments: argparse.Namespace) -> None:
    from data_prep.standin import stand_in_tables

    for path in stand_in_tables(arguments.stores, arguments.out, orthologs=arguments.orthologs, width=arguments.width):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
