"""`python -m wanrt.tiny COMMAND`: train, measure and picture wan-tiny.

tokenizer   write tokenizer.json
world       a contact sheet of the world
judge       train the judge of attributes on rendered truth
vae         train the VAE; under torchrun on several GPUs
corpus      encode clips with a trained VAE, one shard per rank
transformer train transformer and text encoder on the shards; under torchrun on several GPUs
evaluate    measure videos of held-out prompts; write a JSON and pictures
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import fields, replace
from pathlib import Path

import torch

from wanrt.tiny import captions, training
from wanrt.tiny.training import Budget, Ranks

ASSETS = Path(__file__).parent / "assets"
logger = logging.getLogger("wanrt.tiny")


def _override(recipe, pairs):  # type: ignore[no-untyped-def]
    """`key=value` words into the recipe's fields, by their present type."""
    kinds = {f.name: type(getattr(recipe, f.name)) for f in fields(recipe)}
    values = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        if key not in kinds:
            raise SystemExit(f"recipe has no {key!r}; it has {', '.join(kinds)}")
        kind = kinds[key]
        values[key] = text in ("1", "true", "yes") if kind is bool else kind(text)
    return replace(recipe, **values)


def _budget(args: argparse.Namespace) -> Budget:
    return Budget(steps=args.steps, minutes=args.minutes, warmup=args.warmup)


def run_tokenizer(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    captions.write_tokenizer(args.out / "tokenizer.json")


def run_world(args: argparse.Namespace) -> None:
    from wanrt.tiny.pictures import contact_sheet, save_picture
    from wanrt.tiny.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, cat, scene
    from wanrt.tiny.world import World

    rows = [
        scene(shape=SHAPES[i % 8], colour=COLOURS[i * 3 % 8], motion=MOTIONS[i % 7], background=b)
        for i, b in enumerate(BACKGROUNDS)
    ]
    pixels, _ = World().render(cat(rows), torch.arange(0, 48, 8))
    args.out.mkdir(parents=True, exist_ok=True)
    save_picture(contact_sheet(pixels, list(range(6))), args.out / "world.png")


def run_judge(args: argparse.Namespace) -> None:
    from wanrt.tiny.judge import save_judge, train_judge, validate

    args.out.mkdir(parents=True, exist_ok=True)
    judge, world = train_judge(_budget(args), batch=args.batch or 48, lr=args.lr or 1e-3)
    save_judge(judge, args.out / "judge.safetensors")
    results = validate(judge, world, args.count or 480)
    (args.out / "judge.json").write_text(json.dumps(results, indent=1) + "\n")
    logger.info("judge on held-out truth: %s", json.dumps(results))


def run_vae(args: argparse.Namespace) -> None:
    from wanrt.tiny.vae_training import VaeRecipe, VaeTrainer, finish_vae

    ranks = Ranks.start()
    recipe = _override(VaeRecipe(seed=args.seed, budget=_budget(args)), args.set)
    begun = time.monotonic()
    trainer = VaeTrainer(recipe, ranks)
    if args.resume:
        trainer.run.restore(training.load(args.resume), weights_only=args.weights_only)
    trainer.train(args.out)
    seconds = time.monotonic() - begun
    if ranks.leads:
        finish_vae(trainer, args.out, seconds, count=args.count or 64)
    ranks.stop()


def run_corpus(args: argparse.Namespace) -> None:
    from wanrt.tiny.corpus import encode_corpus
    from wanrt.tiny.vae_training import load_vae
    from wanrt.tiny.world import World

    ranks = Ranks.start()
    begun = time.monotonic()
    vae = load_vae(args.vae, ranks.device)
    world = World(args.height, args.width, ranks.device)
    seed = training.mixed_seed(args.seed, ranks.rank, 21) % 2**31
    gpu = ranks.device.type == "cuda"
    corpus = encode_corpus(
        vae, world, args.tokenizer, seed=seed, count=args.count or 4000, batch=args.batch or 8, half=gpu
    )
    training.save(
        {f.name: getattr(corpus, f.name).cpu() for f in fields(corpus)}, args.out / f"corpus{ranks.rank}.pt"
    )
    logger.info("corpus %d: %d clips, %.0f s", ranks.rank, len(corpus), time.monotonic() - begun)
    ranks.stop()


def run_transformer(args: argparse.Namespace) -> None:
    from wanrt.tiny.corpus import Corpus
    from wanrt.tiny.transformer_training import (
        TransformerRecipe,
        TransformerTrainer,
        export,
        import_weights,
    )
    from wanrt.tiny.vae_training import load_vae

    ranks = Ranks.start()
    shard = ranks.rank if args.shard < 0 else args.shard
    corpus = Corpus(
        **{k: v.to(ranks.device) for k, v in training.load(args.corpus / f"corpus{shard}.pt").items()}
    )
    vae = load_vae(args.vae, ranks.device)
    recipe = _override(TransformerRecipe(seed=args.seed, budget=_budget(args)), args.set)
    trainer = TransformerTrainer(recipe, corpus, vae, ranks)
    if args.resume:
        trainer.run.restore(training.load(args.resume), weights_only=args.weights_only)
    if args.start:
        import_weights(trainer.run, args.start)
    begun = time.monotonic()
    trainer.train(args.out)
    if ranks.leads:
        export(trainer.run, args.out)
        probe = trainer.probe(corpus)
        results = {"steps": trainer.run.step, "seconds": time.monotonic() - begun, "probe": probe}
        (args.out / "transformer.json").write_text(json.dumps(results, indent=1) + "\n")
        logger.info("transformer: %s", json.dumps(results))
    ranks.stop()


def run_evaluate(args: argparse.Namespace) -> None:
    from wanrt.tiny.evaluate import Models, Shot, measure, measure_change, pictures
    from wanrt.tiny.judge import load_judge
    from wanrt.tiny.transformer_training import load_models
    from wanrt.tiny.vae_training import load_vae

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = device.type == "cuda"
    transformer, text = load_models(args.models, device)
    models = Models(transformer, text, load_vae(args.vae, device), args.tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    results: dict[str, object] = {}
    if args.pictures:
        pictures(models, args.out, half=half)
        logger.info("pictures: %.0f s", time.monotonic() - begun)
    if args.judge:
        judge = load_judge(args.judge, device)
        count = args.count or 200
        shots = {"four steps": Shot(args.chunks, half=half)}
        if args.more:
            shots["latent anchors"] = Shot(args.chunks, anchor="latent", half=half)
            many = tuple(1000 * 5 * s / (1 + 4 * s) for s in [1 - i / 16 for i in range(16)])
            shots["sixteen steps"] = Shot(9, steps=many, half=half)
        for name, shot in shots.items():
            results[name] = measure(models, judge, prompts=count, shot=shot, batch=args.batch or 50)
            logger.info("%s (%.0f s): %s", name, time.monotonic() - begun, json.dumps(results[name]))
        results["prompt change"] = measure_change(
            models, judge, prompts=min(count, 64), shot=Shot(11, half=half)
        )
        logger.info("prompt change: %s", json.dumps(results["prompt change"]))
        (args.out / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")


COMMANDS = {
    "tokenizer": run_tokenizer,
    "world": run_world,
    "judge": run_judge,
    "vae": run_vae,
    "corpus": run_corpus,
    "transformer": run_transformer,
    "evaluate": run_evaluate,
}


def parser() -> argparse.ArgumentParser:
    """The command line; every command shares one set of options."""
    p = argparse.ArgumentParser(
        "python -m wanrt.tiny", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("command", choices=sorted(COMMANDS))
    p.add_argument("--out", type=Path, required=True, help="folder for what the command writes")
    p.add_argument("--minutes", type=float, default=1.0, help="training time of this run")
    p.add_argument("--steps", type=int, default=0, help="training steps; wins over --minutes")
    p.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of the recipe")
    p.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    p.add_argument("--start", type=Path, help="folder of exported weights to start from")
    p.add_argument("--weights-only", action="store_true", help="take the weights, start the schedule anew")
    p.add_argument("--lr", type=float, default=0.0, help="of the judge")
    p.add_argument("--batch", type=int, default=0)
    p.add_argument("--count", type=int, default=0, help="clips or prompts")
    p.add_argument("--chunks", type=int, default=16, help="chunks of a measured video")
    p.add_argument("--more", action="store_true", help="measure latent anchors and sixteen steps, too")
    p.add_argument("--pictures", action="store_true", help="write a contact sheet and a GIF")
    p.add_argument("--height", type=int, default=128)
    p.add_argument("--width", type=int, default=224)
    p.add_argument("--vae", type=Path, default=ASSETS / "vae.safetensors")
    p.add_argument("--models", type=Path, default=ASSETS, help="folder of transformer and text weights")
    p.add_argument("--tokenizer", type=Path, default=ASSETS / "tokenizer.json")
    p.add_argument("--judge", type=Path, help="the judge's weights")
    p.add_argument("--corpus", type=Path, help="folder of the shards")
    p.add_argument("--shard", type=int, default=-1, help="the shard to use instead of this rank's")
    return p


def main() -> None:
    """Run one command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parser().parse_args()
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
