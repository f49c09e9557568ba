"""The known defects, one a row, and the controls, which are none."""

from __future__ import annotations

from stages.validate.self_test import graphs, inputs, networks
from stages.validate.self_test.subject import Defect

DEFECTS: tuple[Defect, ...] = (
    # --- the graph
    Defect("label permutation", "graph", "each output says what its neighbour should",
           "labels sorted by name in one place and by number in another",
           graphs.permute_labels),
    Defect("outputs swapped", "graph", "two outputs of one shape have each other's names",
           "Olive compares the first output only", graphs.swap_outputs),
    Defect("one output biased", "graph", "one output larger by a standard deviation of all",
           "shifts the answers to one class; few samples flip where margins are wide", graphs.bias_one_output),
    Defect("outputs halved", "graph", "a temperature of two",
           "keeps cosine, accuracy and argmax: only KL, ECE and SQNR notice", graphs.halve_outputs),
    Defect("NaN in an output", "graph", "one output is NaN",
           "torch.onnx's verify passes when both sides are NaN; `NaN > tolerance` is False", graphs.give_nan),
    Defect("missing output", "graph", "an output has another name",
           "Polygraphy 0.53 passes on an output that is missing from one side", graphs.lose_output),
    Defect("static batch", "graph", "a batch of 2 behind an axis that is called dynamic",
           "torch.export specialises what the example has", graphs.freeze_batch, refused=True),
    Defect("first answer for all", "graph", "the answer to the first sample of a batch is given to all of it",
           "a comparison on one sample sees nothing", graphs.repeat_first),
    Defect("weight channels permuted", "graph", "the output channels of one weight move by one",
           "a layout conversion that was done twice", graphs.permute_channels),
    Defect("dead channel", "graph", "one channel of a hidden layer is zero",
           "one random input at an absolute tolerance of 1e-3 saw nothing of it", graphs.kill_channel),
    Defect("dropout left on", "graph", "a tenth of what the last product reads is zero, at random",
           "an export in training mode", graphs.leave_dropout_on),
    Defect("weights in 4 bits", "graph", "every weight rounded to 4 bits, one scale a tensor",
           "a candidate of fewer bits than its name says", graphs.round_to_four_bits, "int8"),
    Defect("INT8 ranges too narrow", "graph", "activations saturate at a tenth of their range",
           "winml-cli calibrated on random tensors (issue 260)", graphs.narrow_ranges, "int8"),
    Defect("FP16 overflow", "graph", "half of an activation's range is infinite in FP16",
           "activations above 65,504 become infinite, and ReLU6 or a softmax hide it", graphs.overflow_fp16, "fp16"),
    # --- the network
    Defect("wrong mean and deviation", "network", "pixels normalised by 0.5 in place of their own mean and deviation",
           "a checkpoint's numbers are in another file than its weights", networks.normalise_wrong),
    Defect("scaled twice", "network", "pixels divided by 255 twice",
           "a caller who normalises in front of a graph that does", networks.scale_twice),
    Defect("stale batch norm", "network", "one batch norm has the statistics of a new one",
           "statistics are buffers, which adapters do not carry", networks.forget_statistics),
    # --- the preprocessing
    Defect("BGR", "preprocessing", "blue and red are swapped",
           "OpenCV reads so; a channel swap passed MLPerf-99", inputs.swap_channels),
    Defect("nearest resize", "preprocessing", "the nearest pixel, without antialias",
           "a resize in the graph that TensorRT takes", inputs.resize_nearest),
    Defect("another resize filter", "preprocessing", "bilinear in place of bicubic, or the other way round",
           "ResNet-18 lost 0.8 points from the resize alone (shift-happens 62)", inputs.resize_otherwise),
    Defect("squashed, not cropped", "preprocessing", "the proportions change, or the borders are lost",
           "DeepStream squashes by default", inputs.fit_otherwise),
    Defect("padding on the left", "preprocessing", "padding before the text",
           "decoders' tokenizers pad there", inputs.pad_left),
    Defect("mask ignored", "preprocessing", "padding counts as text",
           "a runtime that leaves the optional input out", inputs.ignore_mask),
    Defect("case", "preprocessing", "upper and lower case as the tokenizer does not know them",
           "do_lower_case is in another file than the vocabulary", inputs.turn_case),
    Defect("texts cut short", "preprocessing", "a quarter of the tokens that fit",
           "a device's fixed length", inputs.cut_short),
    Defect("marks left out", "preprocessing", "no [CLS] and no [SEP]",
           "add_special_tokens=False, the default of several runtimes", inputs.leave_marks_out),
    Defect("wrong sample rate", "preprocessing", "recordings taken for what they should be resampled to",
           "Olive dropped the value that cast_column returns", inputs.keep_rate),
    Defect("quiet", "preprocessing", "sound at a hundredth of its size",
           "16-bit samples divided by another full scale", inputs.turn_down),
    Defect("level not normalised", "preprocessing", "waveform or filter bank as they come",
           "do_normalize is in another file than the weights", inputs.keep_level),
    # --- the samples
    Defect("samples shuffled", "samples", "each output is compared with another sample's",
           "two loaders with two orders", inputs.shuffle_pairing),
)  # fmt: skip

CONTROLS: tuple[Defect, ...] = (
    Defect("written anew", "graph", "nodes that change nothing, the file written anew", "", graphs.write_anew),
    Defect("PyTorch", "network", "the reference itself", "", networks.run_pytorch),
    Defect("not optimised", "graph", "ONNX Runtime without its optimizations", "", inputs.optimize_nothing),
    Defect("another batch size", "samples", "half as many samples at a time", "", inputs.halve_batch),
)
"""What must pass. A gate that is red here says nothing about a defect."""
