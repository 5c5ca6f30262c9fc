"""The `tftrain` command: run a recipe, check one, embed or label a file, export a checkpoint, compare evaluations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tftrain import __version__
from tftrain.errors import TftrainError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 a gate failed, 2 the input cannot be used, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except TftrainError as error:
        print(f"tftrain: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tftrain: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tftrain", description="Train, fine-tune and evaluate single-cell models.")
    parser.add_argument("--version", action="version", version=f"tftrain {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe; the same command continues an interrupted run")
    run.set_defaults(run=_run)
    check = commands.add_parser("check", help="resolve a recipe and print everything that follows from it")
    check.set_defaults(run=_check)
    for command in (run, check):
        command.add_argument("recipe", metavar="RECIPE", help="YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="replaces a value, such as train.steps=100"
        )

    embed = commands.add_parser("embed", help="embed the cells of an .h5ad file")
    embed.set_defaults(run=_embed)
    embed.add_argument("checkpoint", metavar="CHECKPOINT", help="folder: a published one, or one of a run of ours")
    embed.add_argument("cells", metavar="CELLS.h5ad", help="raw counts with Ensembl gene ids")
    embed.add_argument("out", metavar="OUT.h5ad", help="written whole or not at all; obs_names and obs are kept")
    embed.add_argument(
        "--emb-type", choices=("cell", "cge"), default="cell", help="cell embeddings, or contextual gene embeddings"
    )
    embed.add_argument("--output-keys", default="embeddings", help="of embeddings,llh,gene_llh; default embeddings")
    embed.add_argument(
        "--pretrained-embedding", metavar="FILE.h5", help="protein table of a species the model has not seen"
    )
    embed.add_argument("--gene-col-name", help="var column of gene ids; default ensembl_id, or else the index")

    report = commands.add_parser("report", help="compare the evaluations of several runs")
    report.set_defaults(run=_report)
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or its evaluation folder")
    report.add_argument("--out", default="comparison.html", metavar="PAGE.html", help="default comparison.html")

    predict = commands.add_parser("predict", help="label the cells of an .h5ad file")
    predict.set_defaults(run=_predict)
    predict.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder or checkpoint of a run with a head")
    predict.add_argument("cells", metavar="CELLS.h5ad", help="raw counts with Ensembl gene ids")
    predict.add_argument("out", metavar="OUT.h5ad", help="written whole or not at all; obs_names and obs are kept")
    predict.add_argument("--no-unknown", action="store_true", help="label uncertain cells too")
    predict.add_argument("--gene-col-name", help="var column of gene ids; default ensembl_id, or else the index")

    export = commands.add_parser("export", help="write a checkpoint in the published layout, adapters merged")
    export.set_defaults(run=_export)
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder: a published one, or one of a run of ours")
    export.add_argument("out", metavar="OUT", help="new folder")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from tftrain.recipe import load
    from tftrain.run import run_recipe

    return run_recipe(load(arguments.recipe, arguments.overrides))


def _check(arguments: argparse.Namespace) -> int:
    from tftrain.assemble import derive
    from tftrain.recipe import TrainRecipe, dump, load

    recipe = load(arguments.recipe, arguments.overrides)
    print(dump(recipe))
    if isinstance(recipe, TrainRecipe):
        for line in derive(recipe):
            print(line)
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    from tftrain.embed import embed_h5ad

    embed_h5ad(
        arguments.checkpoint,
        arguments.cells,
        arguments.out,
        emb_type=arguments.emb_type,
        output_keys=tuple(key.strip() for key in arguments.output_keys.split(",") if key.strip()),
        pretrained_embedding=arguments.pretrained_embedding,
        gene_col_name=arguments.gene_col_name,
    )
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from tftrain.evals.compare import compare

    compare(arguments.runs, arguments.out)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from tftrain.predict import predict_h5ad

    predict_h5ad(
        arguments.checkpoint,
        arguments.cells,
        arguments.out,
        is_unknown_told=not arguments.no_unknown,
        gene_col_name=arguments.gene_col_name,
    )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from tftrain.export import export

    print(export(arguments.checkpoint, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
