"""Texts of `darkroom --help` and of the help of the commands that run a recipe."""

HELP = """\
usage: darkroom COMMAND ...

train, evaluate and predict
  demo                       train a super-resolution network on photographs, in two minutes
  fit RECIPE [--KEY VALUE]   train, then evaluate on the available test sets
  folds RECIPE N             train once for each of N shares of the images: cross-validation
  validate RECIPE            evaluate on the validation set
  test RECIPE                evaluate on the available test sets
  predict RECIPE --input PATH                apply a method to an image, a folder or a video (--output FOLDER)
  sample RECIPE --output FOLDER              generate images from noise (--count N)
  interpolate RECIPE --indices 3 17 42       interpolate in latent space between samples (--images: between test images)
  arithmetic RECIPE --plus 1 2 --minus 3 4   add and subtract the latents of samples
  manifold RECIPE                            plot decoder outputs over a 2-D latent grid (--grid-size N)
  growth RECIPE                              show samples of the same latents at the end of each stage (--run NAME)
  nearest RECIPE                             show samples and the training images nearest to them (--count N, --k N)
  reconstruct RECIPE                         show test images and their reconstructions (--indices 0 1 2)
  retrieve RECIPE                            find the test images with codes similar to a query image's (--indices 0 1 2, --k N)
  export RECIPE --output FILE.safetensors    write weights with a description of their network, one file for predict
  neural-style CONTENT STYLE                 transfer a style by optimization of the image (--size N, --steps N)
  deepdream IMAGE                            amplify the features of a network in an image (--layer NAME)

  RECIPE is a name, such as espcn/t91_x3, or the path of a YAML file. The name espcn alone means espcn/demo.
  Any key can be overridden: darkroom fit espcn/t91_x3 --model.activation relu --trainer.devices 2
  With fit, --run NAME names a run, or resumes it if it exists; --wandb offline also logs to Weights & Biases.
  To evaluate or apply a network, give the folder of a run instead of RECIPE, or RECIPE and --run NAME (or --run latest):
  the network then has the settings of the run. --ckpt FILE selects other weights. predict, sample and the like also take
  a file of weights instead of RECIPE, if it describes its network (darkroom export); --modules FILE allows it your classes.
  darkroom fit RECIPE --help lists all keys.

inspect, reproduce and scale
  list [METHOD]              list the methods, or describe the recipes of METHOD
  reproduce METHOD           print the paper's tables with published values and ours (--run, --check, --write, --json)
  sweep FILE                 search hyperparameters as defined by FILE, such as sweeps/espcn.yaml (--storage S)
  submit RECIPE|FILE         train or search on a SLURM cluster (--nodes N, --gpus N, --workers N, --dry-run)
  bench RECIPE               compare the training speed with a plain PyTorch loop and with PIL loading (--json)
  bench --feed [RECIPE ...]  compare the speed of the data by themselves with PIL loading (--json)
  scaling RECIPE ...         measure the speedup of several processes, and estimate that of 8 and 64 GPUs (--write)
  style-speed RECIPE         compare the speed of a style network with that of optimization (--write)
  style-objective RECIPE     compare the objective of a style network with that of optimization (--write)
  data list                  list the datasets and whether they are installed
  data get NAME              download a dataset
  data verify NAME           compare a dataset with its manifest, a list of hashes

environment
  DARKROOM_DATA              folder of the datasets (now: {data})
  DARKROOM_RUNS              folder of the runs (now: {runs})
  DARKROOM_CACHE             folder of cached features of real images (default: the user's cache folder)
"""

RUN_HELP = """\
usage: darkroom {command} RECIPE {options} [--KEY VALUE ...]

  RECIPE is METHOD/NAME, such as espcn/t91_x3, or the path of a YAML file{or_run}. METHOD alone means METHOD/demo.
  METHOD is one of: {methods}
  darkroom list METHOD describes the recipes of a method.

  darkroom {command} RECIPE --help lists every key that can be overridden.
"""
# Options of each command in addition to the recipe's keys.
COMMAND_OPTIONS = {
    "fit": "[--run NAME] [--wandb offline|online]",
    "validate": "[--run NAME|latest] [--ckpt FILE]",
    "test": "[--run NAME|latest] [--ckpt FILE] [--record FILE]",
    "predict": "--input PATH [--output FOLDER] [--direction AtoB|BtoA] [--style S] [--alpha A] [--temperature T] [--score T]"
    " [--run NAME|latest] [--ckpt FILE] [--modules FILE]",
}
