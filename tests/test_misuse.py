"""Misuse of every verb: status 2, an error that names the wrong value, a hint, and nothing changes on disk."""

import os
import pickle
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file
from support import command

from mae_fast.cli import VERBS
from mae_fast.errors import UserError
from mae_fast.models.mae import build

SMALL = "--preset tiny --batch-size 2 --num-workers 0 --epochs 1 --warmup-epochs 0"
# The first words of the commands below.
WORDS = {
    "PRETRAIN": f"pretrain {SMALL} --data-path images --output-dir out",
    "FINETUNE": f"finetune {SMALL} --data-path labelled --output-dir out",
    "PARTIAL": f"finetune --train-blocks 1 {SMALL} --data-path labelled --output-dir out",
    "LINPROBE": f"linprobe {SMALL} --data-path labelled --output-dir out",
    "DVAE": f"train-dvae {SMALL} --data-path images --output-dir out",
    "SEGMENT": f"segment {SMALL} --data-path images --output-dir out",
    "DETECT": f"detect {SMALL} --data-path images --output-dir out",
    "RECONSTRUCT": "reconstruct run --images images --output x.png",
    "ABLATE": "ablate mask-ratio --preset tiny --output-dir out --data-path labelled",
}

# For each command line, what the error and the hint must contain.
MISUSE = {
    # unknown verbs, flags and arguments
    "fly": ("unknown verb 'fly'", "pretrain, finetune"),
    "pretrian": ("unknown verb 'pretrian'", "did you mean pretrain?"),
    "--flag": ("unknown verb '--flag'", "pretrain, finetune"),
    "pretrain": ("missing: --data-path, --output-dir", "see mae-fast pretrain --help"),
    "pretrain --data-path images": ("missing: --output-dir", "see mae-fast pretrain --help"),
    "PRETRAIN --batchsize 3 --foo": ("unknown flag --batchsize, --foo", "did you mean --batch-size? see mae-fast"),
    "PRETRAIN --batch_sise 3": ("unknown flag --batch_sise", "did you mean --batch-size?"),
    "PRETRAIN --no-norm_pix_los": ("unknown flag --no-norm_pix_los", "did you mean --no-norm-pix-loss?"),
    "pretrain --data_pth images --output_dir out": ("unknown flag --data_pth", "did you mean --data-path?"),
    "PRETRAIN --qqq": ("unknown flag --qqq", "see mae-fast pretrain --help"),
    "PRETRAIN -v": ("unknown flag -v", "see mae-fast pretrain --help"),
    "PRETRAIN extra": ("unexpected argument 'extra'", "see mae-fast pretrain --help"),
    "PRETRAIN --cache yes": ("unexpected argument 'yes'", "see mae-fast pretrain --help"),
    "PRETRAIN --epochs": ("--epochs has no value", "see mae-fast pretrain --help"),
    "PRETRAIN --preset": ("--preset ", "known are base, large, huge, small, tiny16, tiny"),
    "PRETRAIN --preset giant": ("--preset giant", "known are base, large, huge, small, tiny16, tiny"),
    "PRETRAIN --resume x.pth": ("--resume x.pth", "--init"),
    "PRETRAIN --output_dir ''": ("--output_dir is empty", "give a path"),
    "PRETRAIN --data-path ''": ("--data-path is empty", "give a path"),
    "FINETUNE --weight run": ("unknown flag --weight", "did you mean --weights?"),
    "LINPROBE --resume x": ("--resume x", "use --weights"),
    "LINPROBE --drop-path 0.1": ("unknown flag --drop-path", "see mae-fast linprobe --help"),
    "DVAE --resume x": ("--resume x", "leave the flag out"),
    "data": ("data", "data demo, data scenes"),
    "data chek images": ("data chek", "data demo, data scenes"),
    "data check": ("missing: path", "see mae-fast data check --help"),
    "data check images --evry-pixel": ("unknown flag --evry-pixel", "did you mean --every-pixel? see mae-fast data"),
    "doctor now": ("got 'now'", "give one of pretrain, "),
    "demo": ("missing: directory", "see mae-fast demo --help"),
    "demo a b": ("unexpected argument 'b'", "see mae-fast demo --help"),
    "study --seed=3 x y": ("unknown flag --seed=3", "see mae-fast study --help"),
    "data pack --qualitty=3 --size=9 a": ("unknown flag --qualitty=3", "did you mean --quality?"),
    "study --seed 3": ("unknown flag --seed", "see mae-fast study --help"),
    "data check --evry-pixel images": ("unknown flag --evry-pixel", "did you mean --every-pixel? see mae-fast data"),
    "convert": ("missing: input, output, --to", "see mae-fast convert --help"),
    "debug-step": ("missing: dump", "see mae-fast debug-step --help"),
    "bench --predit": ("unknown flag --predit", "did you mean --predict?"),
    "bench --rounds 0": ("--rounds 0", "give 1 or more"),
    # numbers and choices
    "PRETRAIN --batch-size 0": ("--batch-size 0", "greater than or equal to 1"),
    "PRETRAIN --batch-size -2": ("--batch-size -2", "greater than or equal to 1"),
    "PRETRAIN --batch-size 2.5": ("--batch-size 2.5: expected INT", "see mae-fast pretrain --help"),
    "PRETRAIN --batch-size 99999999999999999999": ("images holds 4 images, fewer than one step", "lower --batch-size"),
    "PRETRAIN --accum-iter 3": ("images holds 4 images, fewer than one step of 6", "lower --batch-size or --accum-it"),
    "PRETRAIN --input-size 0": ("--input-size 0", "greater than or equal to 1"),
    "PRETRAIN --input-size 30": ("got img_size=30, patch_size=4", "the nearest size is 28 x 28"),
    "PRETRAIN --input-size 400000000": ("not enough memory", "smaller"),
    "PRETRAIN --epochs many": ("--epochs many: expected INT", "see mae-fast pretrain --help"),
    "PRETRAIN --warmup-epochs 1": ("warmup_epochs must be below epochs, got 1 and 1", "use --warmup-epochs 0.05"),
    "PRETRAIN --crops-per-image 3": ("multiple of crops_per_image, got 2 and 3", "use --batch-size 3"),
    "PRETRAIN --mask-ratio nan": ("--mask-ratio nan", "a finite number"),
    "PRETRAIN --mask-ratio 1": ("--mask-ratio 1.0", "less than 1"),
    "PRETRAIN --mask-ratio 75%": ("--mask-ratio 75%: expected FLOAT", "see mae-fast pretrain --help"),
    "PRETRAIN --mask-ratio 0.999": ("--mask-ratio 0.999 leaves no visible patch of 64", "use 0.01 to 0.98"),
    "PRETRAIN --decoder-depth -1": ("--decoder-depth -1", "greater than or equal to 0"),
    "PRETRAIN --lr inf": ("--lr inf", "a finite number"),
    "PRETRAIN --lr -1": ("--lr -1", "greater than 0"),
    "PRETRAIN --lr 0,1": ("--lr 0,1: expected FLOAT", "see mae-fast pretrain --help"),
    "PRETRAIN --min-lr -inf": ("--min-lr -inf", "a finite number"),
    "PRETRAIN --lr 1e-4 --min-lr 1e-3": ("--min-lr 0.001 is above the learning rate, 0.0001", "lower --min-lr, or"),
    "PRETRAIN --blr 1 --min-lr 0.01": ("--min-lr 0.01 is above the learning rate, 0.0078125", "lower --min-lr, or"),
    "PRETRAIN --dry-run --lr 1e-4 --min-lr 1e-3": ("--min-lr 0.001 is above the learning rate", "lower --min-lr, or"),
    "PRETRAIN --weight-decay -0.1": ("--weight-decay -0.1", "greater than or equal to 0"),
    "PRETRAIN --clip-grad 0": ("--clip-grad 0", "greater than 0"),
    "PRETRAIN --seed -1": ("--seed -1", "greater than or equal to 0"),
    "PRETRAIN --seed 9223372036854775808": ("--seed 9223372036854775808", "less than 9223372036854775808"),
    "PRETRAIN --num-workers -1": ("--num-workers -1", "greater than or equal to 0"),
    "PRETRAIN --save-every 0": ("--save-every 0", "greater than or equal to 1"),
    "PRETRAIN --ema-decay 1": ("--ema-decay 1", "less than 1"),
    "PRETRAIN --max-bad-fraction 2": ("--max-bad-fraction 2", "less than or equal to 1"),
    "PRETRAIN --device tpu": ("--device tpu is unknown", "give one of auto, cpu, cuda"),
    "PRETRAIN --dtype fp16": ("--dtype fp16 is unknown", "give one of auto, bf16, fp32"),
    "PRETRAIN --augmentation rotate": ("--augmentation rotate is unknown", "give one of none, crop-fixed, crop"),
    "PRETRAIN --mask-sampling stripes": ("--mask-sampling stripes is unknown", "give one of random, block, grid"),
    "FINETUNE --drop-path 1": ("--drop-path 1", "less than 1"),
    "FINETUNE --smoothing 1": ("--smoothing 1", "less than 1"),
    "FINETUNE --cutmix -1": ("--cutmix -1", "greater than or equal to 0"),
    "FINETUNE --beta2 1": ("--beta2 1", "less than 1"),
    "FINETUNE --mixup inf": ("--mixup inf", "a finite number"),
    "FINETUNE --reprob 1.1": ("--reprob 1.1", "less than or equal to 1"),
    "FINETUNE --layer-decay 0": ("--layer-decay 0", "greater than 0"),
    "PARTIAL --train-blocks 7": ("--train-blocks 7", "give 0, 0.5, 1, 2, ..., 4 or all"),
    "PARTIAL --train-blocks 0.7": ("--train-blocks 0.7", "give 0, 0.5, 1, 2, ..., 4 or all"),
    "PARTIAL --train-blocks most": ("--train-blocks most: expected FLOAT|{all}", "see mae-fast finetune --help"),
    "LINPROBE --batch-size 1": ("--batch-size 1: the probe's batch norm needs at least 2", "see mae-fast linprobe"),
    "DVAE --hidden 30": ("--hidden 30", "a multiple of 4"),
    "DVAE --vocab-size 1": ("--vocab-size 1", "greater than or equal to 2"),
    "DVAE --groups 40": ("--input-size 32 is not a multiple of 549755813888", "or fewer --groups"),
    "DVAE --input-size 30": ("--input-size 30 is not a multiple of 4", "use --input-size 28"),
    "DVAE --hidden 1000000000": ("not enough memory", "smaller"),
    "SEGMENT --head-channels 0": ("--head-channels 0", "greater than or equal to 1"),
    "DETECT --window -1": ("--window -1", "greater than or equal to 0"),
    "knn run --data-path labelled --k 0": ("--k 0", "give 1 or more"),
    "knn run --data-path labelled --temperature nan": ("--temperature nan", "give more than 0"),
    "knn run --data-path labelled --batch-size 0": ("--batch-size 0", "give 1 or more"),
    "knn run --data-path labelled --pool max": ("--pool max is unknown", "give one of cls, mean"),
    "PRETRAIN --predict-ratio 0": ("--predict-ratio 0", "greater than 0"),
    "PRETRAIN --predict-ratio 1.5": ("--predict-ratio 1.5", "less than or equal to 1"),
    "PRETRAIN --resolution-schedule 16:0.5,32:0.6": ("16:0.5,32:0.6: the shares must sum to 1, got 1.1", "change"),
    "PRETRAIN --resolution-schedule 16:1": ("has images of 16 pixels", "end with a stage of 32"),
    "PRETRAIN --resolution-schedule 16:0.5,32:0.5": ("with --epochs 1, a share of 0.5 is not", "--epochs 2 or more"),
    "RECONSTRUCT --mask-ratio 0.5 -1": ("--mask-ratio -1", "give shares above 0 and below 1"),
    "RECONSTRUCT --mask-ratio half": ("--mask-ratio half: expected FLOAT", "see mae-fast reconstruct --help"),
    "RECONSTRUCT --mask-ratio 0.999": ("--mask-ratio 0.999 leaves no visible patch", "use 0.01 to 0.98"),
    "RECONSTRUCT --mask-sampling rings": ("--mask-sampling rings is unknown", "give one of "),
    "RECONSTRUCT --show 0": ("--show 0", "give 1 or more"),
    "RECONSTRUCT --seed -1": ("--seed -1", "give 0 to 9223372036854775807"),
    "data check images --in-chans 0": ("--in-chans 0", "give 1 or more"),
    "data check images --max-bad-fraction x": ("--max-bad-fraction x: expected FLOAT", "data check --help"),
    "data pack images new --quality 96": ("--quality 96", "give 1 to 95"),
    "data pack images new --num-workers -2": ("--num-workers -2", "give 0 or more"),
    "export run x.pt2 --what all": ("--what all is unknown", "give one of "),
    "export run x.pt2 --what reconstruction --mask-ratio nan": ("below 1, got nan", "give another"),
    "convert mae.safetensors x.pth --to keras": ("--to keras is unknown", "give one of ours, timm, transformers"),
    "convert mae.safetensors x.pth --to timm --num-heads 0": ("--num-heads 0", "give 1 or more"),
    "ablate nonsense --output-dir out": ("table nonsense is unknown", "give one of decoder-depth, decoder-width"),
    "ABLATE --rows 2": ("--rows 2", "0.1, 0.2, "),
    "ABLATE --seeds 1 1": ("--seeds 1 1", "different numbers, 0 or larger"),
    "ABLATE --seeds -1": ("--seeds -1", "different numbers, 0 or larger"),
    "ABLATE --seeds": ("--seeds ", "different numbers, 0 or larger"),
    "ABLATE --labels 0": ("--labels 0", "give 1 or more"),
    "ABLATE --pretrain '--epohcs 3'": ("unknown flag --epohcs", "did you mean --epochs? see mae-fast pretrain --help"),
    "ABLATE --pretrain '--seed 3'": ("--pretrain '--seed 3'", "leave --seed out"),
    "ABLATE --linprobe \"--epochs '3\"": ("No closing quotation", "check the quotes"),
    "ablate speed --output-dir out --rounds 0": ("--rounds 0", "give 1 or more"),
    # images that are missing or wrong
    "PRETRAIN --data-path nowhere": ("image folder nowhere does not exist", "give a folder of images"),
    "PRETRAIN --data-path empty": ("no images in empty or its sub-folders", "give one with .bmp, .dcm, .gif"),
    "PRETRAIN --data-path file.txt": ("image folder file.txt is not a folder", "give a folder of images"),
    "PRETRAIN --data-path höhe/日本": ("image folder höhe/日本 does not exist", "give a folder of images"),
    "PRETRAIN --data-path 'a\nb'": ("image folder a b does not exist", "give a folder of images"),
    "PRETRAIN --bad-list nowhere.jsonl": ("nowhere.jsonl cannot be read (No such file", "give another list"),
    "PRETRAIN --bad-list bad.jsonl": ("bad.jsonl was written for other images", "mae-fast data check images"),
    "FINETUNE --data-path images": ("image folder images/train does not exist", "give a folder with train/ and val/"),
    "SEGMENT --data-path nowhere": ("nowhere", "give "),
    "DETECT --data-path nowhere": ("nowhere", "give "),
    "logreg-probe run --data-path nowhere": ("image folder nowhere does not exist", "give a folder with train/"),
    "RECONSTRUCT --images": ("no images are given", "give image files or folders"),
    "RECONSTRUCT --images nowhere": ("nowhere does not exist", "give a folder of images"),
    "RECONSTRUCT --images file.txt": ("none of 1 images can be used", "see mae-fast reconstruct --help"),
    "data check labelled": ("labelled contains train/", "give labelled/train"),
    "data pack empty new": ("no images in empty", "give one with .bmp"),
    "ablate mask-ratio --output-dir out": ("ablate mask-ratio needs --data-path", "train/ and val/"),
    "ABLATE --data-path images": ("--data-path images has no train and no val", "train/ and val/"),
    # weights and runs that are missing, damaged, or of another model
    "PRETRAIN --model resnet50": ("--model resnet50 is unknown", "known are mae_vit_base_patch16"),
    "PRETRAIN --model vit_tiny_patch4": ("--model vit_tiny_patch4 is unknown", "known are mae_vit_base_patch16"),
    "PRETRAIN --init nowhere.pth": ("weights nowhere.pth: there is no such file", "give another path"),
    "PRETRAIN --init empty.pth": ("weights empty.pth are an empty file", "download it again"),
    "PRETRAIN --init noise.safetensors": ("weights noise.safetensors are a text file", "download it again"),
    "PRETRAIN --init cut.safetensors": ("weights cut.safetensors are damaged", "download or save them again"),
    "PRETRAIN --init cut.pth": ("weights cut.pth are cut off", "download it again"),
    "PRETRAIN --init numbers.pth": ("numbers.pth has no state dict", "save model.state_dict()"),
    "PRETRAIN --init evil.pth": ("evil.pth has no state dict", "save model.state_dict()"),
    "PRETRAIN --init empty": ("no weights in the folder empty", "give a file"),
    "PRETRAIN --init mae.safetensors --decoder-depth 1": ("decoder_depth 2 instead of 1", "give decoder_depth=2"),
    "PRETRAIN --init vit.safetensors": ("vit.safetensors: missing in the weights", "see mae-fast pretrain"),
    "PRETRAIN --target dvae --tokenizer nowhere": ("weights nowhere cannot be read", "give another path"),
    "PRETRAIN --target dvae --tokenizer run": ("run is a run of mae_vit_tiny_patch4", "give a run of 'mae-fast train-"),
    "PRETRAIN --target dvae --tokenizer empty.pth": ("weights empty.pth are an empty file", "OpenAI's encoder.pkl"),
    "PRETRAIN --masks nowhere.npy": ("--masks nowhere.npy: cannot be read (No such file", "give a .npy file"),
    "PRETRAIN --masks empty": ("--masks empty: cannot be read (Is a directory)", "give a .npy file"),
    "PRETRAIN --masks empty.npy": ("--masks empty.npy: not a .npy file", "write one with numpy.save"),
    "PRETRAIN --masks nine.npy": ("--masks nine.npy: the shape is [1, 9, 9]", "masks of shape [M, 8, 8]"),
    "PRETRAIN --masks nan.npy": ("--masks nan.npy: values must be 0 or 1, mask 0 has nan", "see mae-fast pretrain"),
    "FINETUNE --model resnet50": ("--model resnet50", "known are vit_base_patch16"),
    "FINETUNE --model timm/resnet18": ("--model timm/resnet18", "give one of timm's plain vision transformers"),
    "FINETUNE --model timm/nonsense": ("--model timm/nonsense: Unknown model", "give one of timm's plain"),
    "FINETUNE --weights nowhere.pth": ("weights nowhere.pth: there is no such file", "give another path"),
    "FINETUNE --weights damaged": ("no usable checkpoint in damaged", "give the output folder"),
    "FINETUNE --weights dvae": ("cannot build the model of", "known: mae_vit_base"),
    "FINETUNE --aa trivial": ("--aa trivial: not a RandAugment policy", "such as rand-m9-mstd0.5-inc1"),
    "FINETUNE --eval-only": ("--eval-only: out is not a run", "give the folder of a run, or --weights"),
    "FINETUNE --eval-only --weights mae.safetensors": ("mae.safetensors has no head", "fine-tune it first"),
    "FINETUNE --eval-only --output-dir run": ("run is a run of mae_vit_tiny_patch4, which has no head", "fine-tune or"),
    "FINETUNE --eval-only --output-dir damaged": ("no usable checkpoint in damaged", "give the output folder"),
    "FINETUNE --eval-only --output-dir tuned --ema": ("has no averaged weights", "leave --ema out"),
    "SEGMENT --eval-only --output-dir nowhere": ("nowhere", ""),
    "knn nowhere --data-path labelled": ("weights nowhere: there is no such file", "give another path"),
    "knn mae.safetensors --data-path labelled --model no": ("unknown model 'no'", "known: mae_vit_base_patch16"),
    "knn run --data-path labelled --ema": ("has no averaged weights", "leave --ema out"),
    "logreg-probe empty --data-path labelled": ("no weights in the folder empty", "give a file"),
    "features images --weights nowhere --output x.npy": ("weights nowhere: there is no such", "give another path"),
    "features nowhere --weights run --output x.npy": ("nowhere does not exist", "give a folder"),
    "features labelled --weights run --output x.npy": ("labelled ", "give labelled/train"),
    "features images --weights run --output x.csv": ("x.csv: unknown format", "such as x.npy"),
    "features images --weights run --output x.npy --layers 9": ("--layers must be in -4..3, got [9]", "see mae-fast"),
    "features images --weights run --output x.npy --pool max": ("--pool max is unknown", "cls, mean, map"),
    "features images --weights dvae --output x.npy": ("unknown model 'dvae'", "known: mae_vit_base"),
    "attention images --weights nowhere": ("weights nowhere: there is no such file", "give another path"),
    "attention nowhere --weights run": ("nowhere does not exist", "give a folder"),
    "attention images/0.jpg --weights run --show 0": ("--show 0", "give 1 or more"),
    "attention images --weights run --output x.html": ("--output x.html", "x.png"),
    "reconstruct tuned --images images": ("tuned is a run of a classifier", "give a run of pre-training"),
    "reconstruct damaged --images images": ("no usable checkpoint in damaged", "give the output folder"),
    "RECONSTRUCT --masks nine.npy": ("--masks nine.npy: the shape is [1, 9, 9]", "masks of shape [M, 8, 8]"),
    "debug-step nowhere.json": ("nowhere.json cannot be read (No such file", "give RUN/not_finite/step-"),
    "debug-step list.json": ("list.json is not a dump", "give RUN/not_finite/step-"),
    "debug-step cut.json": ("cut.json is not a dump", "give RUN/not_finite/step-"),
    "debug-step empty": ("empty cannot be read (Is a directory)", "give RUN/not_finite/step-"),
    "export nowhere x.pt2 --what encoder": ("weights nowhere: there is no such file", "give another path"),
    "export run x.pt2 --what classifier": ("MaskedAutoencoderViT has no 'classifier'", "give encoder or"),
    "export dvae x.pt2 --what encoder": ("unknown model 'dvae'", "known: mae_vit_base_patch16"),
    "convert nowhere x.pth --to timm": ("weights nowhere: there is no such file", "give another path"),
    "convert cut.pth x.pth --to timm": ("weights cut.pth are cut off", "download it again"),
    "convert mae.safetensors x.pth --to timm --from lightly": ("unknown in the layout 'lightly'", "one of the layouts"),
    # conflicting flags
    "PRETRAIN --masks eight.npy --mask-sampling grid": ("--mask-sampling grid has no effect", "leave one"),
    "PRETRAIN --mask-sampling grid --mask-ratio 0.6": ("--mask-sampling grid: 8 x 8 patches", "feasible ratios: 0.5, "),
    "PRETRAIN --lr 1e-3 --blr 1e-3": ("--blr 0.001 has no effect with --lr 0.001", "leave one of them out"),
    "FINETUNE --eval-only --dry-run": ("--dry-run True has no effect with --eval-only", "leave one of them out"),
    "PRETRAIN --decoder-depth 0": ("--decoder-depth 0 predicts", "add --encoder-mask-token, or use at least 1 block"),
    "PRETRAIN --decoder-embed-dim 30": ("the width must be a multiple of 4, got 30", "see mae-fast pretrain --help"),
    "PRETRAIN --decoder-num-heads 5": ("multiple of the number of heads, got 96 and 5", "see mae-fast pretrain --help"),
    "PRETRAIN --target dvae": ("--target dvae needs --tokenizer", "give a run of 'mae-fast train-dvae'"),
    "PRETRAIN --tokenizer dvae": ("--tokenizer dvae requires --target dvae, got --target pixel", "leave one out"),
    "PRETRAIN --target pca --norm-pix-loss": ("--norm-pix-loss requires --target pixel", "leave one of"),
    "PRETRAIN --target pca --pca-components 500": ("has 1 to 48 components, got 500", "see mae-fast pretrain --help"),
    "FINETUNE --ema": ("--predictions and --ema require --eval-only", "add it"),
    "PARTIAL --train-blocks 4 --cache-features": ("no block is frozen with --train-blocks 4", "see mae-fast finetune"),
    "PARTIAL --cache-features --crops-per-image 2": ("--cache-features keeps one crop", "leave --crops-per-image"),
    "DETECT --predictions x.json": ("--predictions and --ema require --eval-only", "add it"),
    "DETECT --min-lr 0.1": ("--min-lr 0.1", "less than or equal to 0"),
    "RECONSTRUCT --masks eight.npy --mask-ratio 0.5": ("--masks eight.npy already gives the masks", "leave --mask"),
    "RECONSTRUCT --masks eight.npy --whole": ("--masks eight.npy requires images of one size", "leave --whole out"),
    "ablate all --output-dir out --data-path labelled --rows 2": ("--rows", "name a table"),
    "convert mae.safetensors x.pth --to timm --ema": ("--ema needs a training run, got mae.safetensors", "leave --ema"),
    # output that cannot or must not be written
    "PRETRAIN --output-dir file.txt": ("output folder file.txt cannot be made: a file is in the way", "choose another"),
    "PRETRAIN --output-dir file.txt/out": ("output folder file.txt/out cannot be made", "choose another"),
    "PRETRAIN --output-dir images": ("images is the folder of the images", "choose another --output-dir"),
    "FINETUNE --output-dir labelled": ("labelled is the folder of the images", "choose another --output-dir"),
    "FINETUNE --output-dir labelled/train": ("labelled/train is the folder of the images", "choose another"),
    "PRETRAIN --output-dir run --lr 0.1": ("run belongs to a run with another configuration (lr: 0.0015", "repeat"),
    "PRETRAIN --output-dir tuned": ("tuned is a run of finetune, not of pretrain", "choose a new --output-dir"),
    "FINETUNE --output-dir run": ("run is a run of pretrain, not of finetune", "choose a new --output-dir"),
    "LINPROBE --output-dir tuned": ("tuned is a run of finetune, not of linprobe", "choose a new --output-dir"),
    "PRETRAIN --output-dir dvae": ("dvae is a run of train-dvae, not of pretrain", "choose a new --output-dir"),
    "FINETUNE --eval-only --output-dir tuned --predictions no/x": ("--predictions no/x: its folder", "make it"),
    "FINETUNE --eval-only --output-dir tuned --predictions empty": ("Is a directory: empty", "give another path"),
    "RECONSTRUCT --output x.pdf": ("--output x.pdf", "x.png"),
    "RECONSTRUCT --output images/0.jpg": ("--output images/0.jpg is one of the images", "give another name"),
    "RECONSTRUCT --output file.txt/x.png": ("File exists: file.txt", "give another path"),
    "data check images --output file.txt": ("file.txt is not a list of bad images", "--output"),
    "data check images --output no/x.jsonl": ("no/x.jsonl cannot be written (No such file", "another path with"),
    "data pack images labelled": ("labelled is not empty", "choose another folder"),
    "data pack images file.txt": ("file.txt cannot be written (File exists)", "choose another folder"),
    "data demo images": ("images is not a demo dataset", "remove it or choose another folder"),
    "data demo file.txt": ("file.txt is not a demo dataset", "remove it or choose another folder"),
    "demo file.txt": ("cannot build", "choose another folder"),
    "export run x.txt --what encoder": ("x.txt", ".onnx or .pt2"),
    "export run file.txt/x.pt2 --what encoder": ("File exists: file.txt", "give another path"),
    "convert mae.safetensors mae.safetensors --to timm": ("mae.safetensors exists", "give another name, or remove it"),
    "convert mae.safetensors x.bin --to timm": ("x.bin", "give a folder, or a file that ends in .safetensors or .pth"),
    "ABLATE --output-dir file.txt": ("--output-dir file.txt is a file", "give a folder"),
    "ablate speed --output-dir file.txt": ("--output-dir file.txt is a file", "give a folder"),
}  # fmt: skip

NO_CUDA = {
    "PRETRAIN --device cuda": ("--device cuda", "use --device cpu"),
    "FINETUNE --device cuda --dry-run": ("--device cuda", "use --device cpu"),
}


MORE = {"FINETUNE --lr nan": ("--lr nan", "a finite number"), "data check empty": ("no images in empty", "give one")}


def words_of(line):
    first, space, rest = line.partition(" ")
    return shlex.split(WORDS.get(first, first) + space + rest)


def pixels(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("sentinel",)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the images, runs and weights, valid and damaged, that the commands name."""
    place = tmp_path_factory.mktemp("place")
    for i in range(4):
        pixels(place / "images" / f"{i}.jpg", i)
        pixels(place / "labelled" / "train" / "ab"[i % 2] / f"{i}.jpg", 16 * i)
        pixels(place / "labelled" / "val" / "ab"[i % 2] / f"{i}.jpg", 16 * i + 64)
    (place / "empty").mkdir()
    (place / "file.txt").write_text("precious")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for line in (
            "PRETRAIN --output-dir run",
            "FINETUNE --output-dir tuned",
            "DVAE --output-dir dvae --hidden 8 --vocab-size 16",
        ):
            patch.setattr(sys, "argv", ["mae-fast", *words_of(line)])
            from mae_fast.cli import main

            main()
    shutil.copytree(place / "run", place / "damaged")
    for path in (place / "damaged" / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    weights = build("mae_vit_tiny_patch4").state_dict()
    save_file(weights, place / "mae.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("norm.")}, place / "vit.safetensors")
    torch.save(weights, place / "cut.pth")
    torch.save({"a": 3}, place / "numbers.pth")
    torch.save({"a": Evil()}, place / "evil.pth", pickle_module=pickle)
    for name, size, whole in (("cut.pth", 50_000, "cut.pth"), ("cut.safetensors", 5_000, "mae.safetensors")):
        (place / name).write_bytes((place / whole).read_bytes()[:size])
    (place / "noise.safetensors").write_bytes(b"no weights" * 50)
    for name in ("empty.pth", "empty.npy"):
        (place / name).touch()
    for name, mask in (("eight", np.eye(8)), ("nine", np.eye(9)), ("nan", np.full((8, 8), np.nan))):
        np.save(place / f"{name}.npy", mask[None])
    (place / "list.json").write_text("[]")
    (place / "cut.json").write_text('{"step": ')
    (place / "bad.jsonl").write_text("nonsense")
    return place


def contents(place):
    """Size and time of all files, except the lock files of runs."""
    found = (path for path in place.rglob("*") if path.name not in ("running.txt", ".lock"))
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns * path.is_file()) for path in found}


def assert_reported(result, what, fix):
    """The command prints an error and a hint, two lines, which may follow warnings."""
    assert result.returncode == 2, result.stderr
    error, hint = [line for line in result.stderr.splitlines() if not line.startswith("mae-fast: warning: ")]
    assert error.startswith("error: ")
    assert what.strip() in error
    assert hint.startswith("hint: ")
    assert fix in f"{error} {hint}"
    assert "None" not in hint
    assert "error" not in result.stdout


@pytest.mark.parametrize("line", [*MISUSE, *NO_CUDA])
def test_misuse(line, place, monkeypatch, capsys):
    if line in NO_CUDA and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(place)
    before = contents(place)
    words = words_of(line)
    result = command(monkeypatch, capsys, *words)
    assert_reported(result, *{**MISUSE, **NO_CUDA}[line])
    assert contents(place) == before


def test_there_are_at_least_120_cases():
    assert len(MISUSE) >= 120


@pytest.mark.parametrize(
    "line",
    ["PRETRAIN --batch_sise 3", "FINETUNE --lr nan", "convert nowhere x.pth --to timm", "data check empty", "fly"],
)
def test_misuse_in_a_separate_process(line, place):
    """The process prints only the two lines, without colours."""
    words = words_of(line)
    run = [sys.executable, "-m", "mae_fast", *words]
    result = subprocess.run(run, cwd=place, capture_output=True, text=True, env={**os.environ, "FORCE_COLOR": "1"})
    assert_reported(result, *{**MISUSE, **MORE}[line])
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 2
    assert "\x1b" not in result.stderr


def test_two_runs_in_one_folder(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (place / "run" / "running.txt").write_text("process 7 on another")
    with FileLock(place / "run" / ".lock"):
        result = command(monkeypatch, capsys, *words_of("PRETRAIN --output-dir run"))
    assert_reported(result, "run is in use by process 7 on another", "wait until it ends, or choose")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("line", ["PRETRAIN --output-dir closed/out", "PRETRAIN --data-path closed"])
def test_folder_without_permissions(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (place / "closed").mkdir(mode=0)
    result = command(monkeypatch, capsys, *words_of(line))
    (place / "closed").rmdir()
    assert_reported(result, "closed", "")


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (OSError(28, "No space left on device", "a/b"), "No space left on device: a/b", "disk"),
        (FileNotFoundError(2, "No such file", "a"), "No such file: a", "give another path"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe", "disk"),
        (MemoryError("7 GiB"), "not enough memory (7 GiB)", "smaller"),
        (RuntimeError("[x] can't allocate memory: 7 bytes"), "not enough memory ([x] can't allocate", "smaller"),
        (UserError("a\n  b; c: d", "e; f"), "a b; c: d", "e; f"),
        (UserError("the folder my; photos: use it"), "the folder my; photos: use it", "see mae-fast doctor --help"),
    ],
    ids=lambda x: repr(x) if isinstance(x, Exception) else "",
)
def test_errors_are_printed_as_two_lines(error, what, fix, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setitem(VERBS, "doctor", fail)
    result = command(monkeypatch, capsys, "doctor")
    assert_reported(result, what, fix)
    if isinstance(error, UserError):
        assert result.stderr.splitlines() == [f"error: {what}", f"hint: {fix}"]


def test_other_exceptions_keep_their_traceback(monkeypatch, capsys):
    def fail(args):
        raise RuntimeError("shapes")

    monkeypatch.setitem(VERBS, "doctor", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        command(monkeypatch, capsys, "doctor")


def test_interruption_exits_with_status_130(monkeypatch, capsys):
    def fail(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "doctor", fail)
    result = command(monkeypatch, capsys, "doctor")
    assert (result.returncode, result.stderr) == (130, "mae-fast: interrupted\n")


def test_tyro_without_the_hook_prints_its_own_error(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro._errors", None)
    result = command(monkeypatch, capsys, "debug-step", "a", "b")
    assert result.returncode == 2
    assert "Unrecognized options: b" in result.stderr
