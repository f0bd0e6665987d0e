"""Mutation check: break one line of the package at a time and expect its test to fail.

    python tests/mutants.py [--only NAME ...] [--jobs N]

Every mutant replaces a text that occurs exactly once in a file of src/dino_ssl. The tests first have to pass on an
unchanged copy. The exit status is 1 if a test passes in spite of its mutant, or if the text or the test of a mutant
no longer exists.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import cache_from_source
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "dino_ssl"
TIMEOUT = 600
"""Seconds that a run of pytest may take."""
TESTS_FAILED = 1
"""pytest's exit status if tests ran and some failed; higher ones mean that the tests could not run."""


class Mutant(NamedTuple):
    """A defect, and the test that must detect it."""

    name: str
    file: str
    """Path below src/dino_ssl."""
    old: str
    """Text that occurs exactly once in the file."""
    new: str
    test: str
    """pytest id below tests/."""


STEP = "invariances/test_train_step.py::"
OBJECTIVES = "equations/test_objectives.py::"
VIEWS = "equations/test_views.py::"

MUTANTS = (
    # -- the training step
    Mutant(
        "unscale is missing",
        "training.py",
        "    scaler.unscale_(optimizer)\n",
        "",
        STEP + "test_gradients_are_unscaled_before_they_are_clipped",
    ),
    Mutant(
        "last layer is frozen one step longer",
        "methods/dino.py",
        "if clock.step < self.config.freeze_last_layer",
        "if clock.step <= self.config.freeze_last_layer",
        STEP + "test_prototypes_are_frozen_in_the_first_epoch_only",
    ),
    Mutant(
        "teacher temperature of step 0",
        "methods/dino.py",
        "teacher_temp=self._teacher_temp(clock),",
        "teacher_temp=self._teacher_temp(clock._replace(step=0)),",
        STEP + "test_loss_has_the_teacher_temperature_of_the_epoch",
    ),
    Mutant(
        "local views for the teacher",
        "methods/dino.py",
        "_bottleneck(self.teacher, batch.views[:1])",
        "_bottleneck(self.teacher, batch.views)",
        STEP + "test_loss_has_the_teacher_temperature_of_the_epoch",
    ),
    Mutant(
        "momentum of the next step",
        "methods/teacher_student.py",
        "self._momentum(clock))",
        "self._momentum(clock._replace(step=clock.step + 1)))",
        STEP + "test_teacher_has_the_momentum_of_the_step",
    ),
    Mutant(
        "teacher in eval mode",
        "methods/teacher_student.py",
        "self.teacher.requires_grad_(False)",
        "self.teacher.requires_grad_(False).eval()",
        STEP + "test_teacher_uses_batch_statistics",
    ),
    Mutant(
        "center weighs ranks",
        "methods/dino.py",
        "distributed.all_reduce_sum(carry.logits) / distributed.all_reduce_sum(carry.count)",
        "distributed.all_reduce_mean(carry.logits / carry.count)",
        STEP + "test_center_weighs_images_and_not_ranks",
    ),
    Mutant(
        "seed of a step without the rank",
        "runtime.py",
        " * 65_537 + self.rank",
        " * 65_537",
        STEP + "test_random_numbers_differ_between_steps_ranks_and_seeds",
    ),
    Mutant(
        "micro-batches with equal weights",
        "training.py",
        "weight = micro_batch.num_images / batch.num_images",
        "weight = 1 / len(micro_batches)",
        "invariances/test_micro_batch.py::test_micro_batches_equal_the_whole_batch[centering-True]",
    ),
    # -- the small tables
    Mutant(
        "learning rate of a configuration at scale small",
        "ablations/table.py",
        "learning_rate(self.small_lr * base.optim.lr)(base)",
        "learning_rate(base.optim.lr)(base)",
        "contracts/test_ablations.py::test_equal_small_configurations_have_equal_learning_rates",
    ),
    Mutant(
        "learning rate of a method on a ResNet at scale small",
        "ablations/changes.py",
        "learning_rate(item.small_lr * base.optim.lr)",
        "learning_rate(base.optim.lr)",
        "contracts/test_ablations.py::test_equal_small_configurations_have_equal_learning_rates",
    ),
    Mutant(
        "final learning rate of a configuration at scale small",
        "ablations/bases.py",
        '"min_lr": run.optim.min_lr * rate / run.optim.lr',
        '"min_lr": run.optim.min_lr',
        "contracts/test_ablations.py::test_small_runs_have_the_schedules_of_short_runs",
    ),
    Mutant(
        "convolutions of the stem",
        "models/blocks.py",
        "nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]",
        "nn.BatchNorm2d(outputs)]",
        "contracts/test_backbones.py::test_conv_stem_equals_its_definition",
    ),
    Mutant(
        "momentum of a short run does not fall",
        "methods/teacher_student.py",
        "max(self.momentum, min(self.momentum_end, 0.98))",
        "min(self.momentum_end, 0.98)",
        "contracts/test_presets.py::test_a_short_run_has_other_final_values_than_a_long_one",
    ),
    # -- the length of a run
    Mutant(
        "schedule for the planned steps",
        "presets/plan.py",
        "short_schedule(fitted, epochs * steps)",
        "short_schedule(fitted, recipe.optim.epochs * steps)",
        "contracts/test_presets.py::test_the_number_of_steps_decides_the_schedule[20-True]",
    ),
    Mutant(
        "a corrected run ends within an epoch",
        "api/time_budget.py",
        "max(fitting, min(clock.epoch + 2, clock.epochs))",
        "fitting",
        "invariances/test_time_budget.py::test_the_number_of_epochs_is_known_after_the_first_percents[60-10-1-1-3]",
    ),
    Mutant(
        "correction is forgotten on resume",
        "training.py",
        'description | ({"corrected": corrected} if corrected else {})',
        "description",
        "invariances/test_time_budget.py::test_the_corrected_run_fits_into_the_time_and_resumes_exactly",
    ),
    # -- the equations
    Mutant(
        "center is added",
        "objectives.py",
        "logits = logits.float() - center",
        "logits = logits.float() + center",
        OBJECTIVES + "test_eq1_subtracts_the_center",
    ),
    Mutant(
        "temperatures are exchanged",
        "objectives.py",
        "P(teacher_logits, teacher_temp, center), log_P(student_logits, student_temp)",
        "P(teacher_logits, student_temp, center), log_P(student_logits, teacher_temp)",
        OBJECTIVES + "test_eq3_is_the_mean_over_pairs_of_different_views",
    ),
    Mutant(
        "pairs of a view with itself",
        "objectives.py",
        "return (all_pairs - same_view) / (batch * (teacher.shape[0] * views - paired))",
        "return all_pairs / (batch * teacher.shape[0] * views)",
        OBJECTIVES + "test_eq3_excludes_pairs_of_a_view_with_itself",
    ),
    Mutant(
        "center with the wrong momentum",
        "objectives.py",
        "return center * momentum + batch_mean * (1 - momentum)",
        "return center * (1 - momentum) + batch_mean * momentum",
        OBJECTIVES + "test_eq4_center_is_an_ema_of_the_batch_mean",
    ),
    Mutant(
        "EMA in the wrong direction",
        "objectives.py",
        "    torch._foreach_mul_(parameters, momentum)",
        "    momentum = 1 - momentum\n    torch._foreach_mul_(parameters, momentum)",
        OBJECTIVES + "test_momentum_update_is_an_ema_of_the_student",
    ),
    Mutant(
        "sign of the entropy",
        "objectives.py",
        "return torch.special.entr(p.float()).sum(-1)",
        "return -torch.special.entr(p.float()).sum(-1)",
        OBJECTIVES + "test_eq5_divergence_from_itself_is_zero_and_entropy_has_its_bounds",
    ),
    Mutant(
        "sign of the kernel's entropy",
        "kernels/loss.py",
        "entropy -= torch.linalg.vecdot(p, log_p).sum()",
        "entropy += torch.linalg.vecdot(p, log_p).sum()",
        "equations/test_kernel_loss.py::test_values_and_gradients_equal_the_reference",
    ),
    Mutant(
        "two Sinkhorn iterations",
        "methods/dino.py",
        'iterations = 3 if self.config.targets == "sinkhorn"',
        'iterations = 2 if self.config.targets == "sinkhorn"',
        "equations/test_targets.py::test_loss_of_each_kind_of_targets_equals_a_loop[sinkhorn]",
    ),
    # -- optimizer and schedules
    Mutant(
        "global gradient norm",
        "optim.py",
        "scales = (max_norm / (norms + 1e-6))",
        "scales = (max_norm / (norms.norm().expand_as(norms) + 1e-6))",
        "equations/test_optim.py::test_clipping_is_per_tensor",
    ),
    Mutant(
        "weight decay of biases",
        "optim.py",
        '"not_decayed" if name.endswith(".bias") or parameter.ndim == 1 else "decayed"',
        '"not_decayed" if parameter.ndim == 0 else "decayed"',
        "equations/test_optim.py::test_groups_follow_the_published_rule",
    ),
    Mutant(
        "learning rate without the batch size",
        "optim.py",
        "self.lr * (self.batch_size / 256)",
        "self.lr",
        "equations/test_optim.py::test_schedules_scale_with_the_batch_and_have_their_final_values",
    ),
    Mutant(
        "warm-up ends one step later",
        "schedules.py",
        "* clock.step / max(1, warm - 1)",
        "* clock.step / max(1, warm)",
        "equations/test_schedules.py::test_warmup_and_cosine_equal_a_loop",
    ),
    Mutant(
        "cosine ends one step earlier",
        "schedules.py",
        "math.cos(math.pi * step / max(1, steps))",
        "math.cos(math.pi * step / max(1, steps - 1))",
        "equations/test_schedules.py::test_cosine_ends_one_step_before_its_final_value",
    ),
    # -- networks
    Mutant(
        "positions without the 0.1",
        "models/vit.py",
        "scale = ((h + 0.1) / self.side, (w + 0.1) / self.side)",
        "scale = (h / self.side, w / self.side)",
        "contracts/test_backbones.py::test_position_interpolation_adds_a_tenth",
    ),
    Mutant(
        "drop-path without rescaling",
        "models/blocks.py",
        "return x * (keep / (1 - rate))",
        "return x * keep",
        "contracts/test_backbones.py::test_drop_path_grows_with_depth_and_keeps_the_mean",
    ),
    Mutant(
        "prototypes of any length",
        "models/heads.py",
        "learn_scale=not norm_last",
        "learn_scale=norm_last",
        "contracts/test_heads.py::test_norm_last_keeps_unit_length",
    ),
    # -- the baselines
    Mutant(
        "queue keeps the oldest rows of a batch",
        "methods/queue.py",
        "rows[-size:].to(self.rows)",
        "rows[:size].to(self.rows)",
        "equations/test_baselines.py::test_queue_keeps_the_newest_rows_for_any_batch_size",
    ),
    Mutant(
        "predictor on BYOL's teacher",
        "methods/byol.py",
        "Network(teacher, heads[1])",
        "Network(teacher, heads[1], predictor)",
        "equations/test_baselines.py::test_byol_compares_predictions_with_projections",
    ),
    Mutant(
        "predictor of a DINO head unused",
        "models/heads.py",
        "x = self.predictor(self.mlp(x))",
        "x = self.mlp(x)",
        "contracts/test_heads.py::test_the_predictor_is_byols_between_mlp_and_normalization",
    ),
    Mutant(
        "predictor on DINO's teacher",
        "methods/dino.py",
        "for predictor in (self.predictor, False)]",
        "for predictor in (self.predictor, self.predictor)]",
        "invariances/test_switches.py::test_only_the_student_has_a_predictor",
    ),
    # -- data
    Mutant(
        "same order in every epoch",
        "data/loader.py",
        "spawn_key=(ORDER, epoch)",
        "spawn_key=(ORDER, 0)",
        "invariances/test_loader.py::test_epoch_orders_are_distinct_permutations",
    ),
    Mutant(
        "scales of global and local views are exchanged",
        "data/transforms/multi_crop.py",
        "[self.global_scale] * 2 + [self.local_scale] * self.local",
        "[self.local_scale] * 2 + [self.global_scale] * self.local",
        VIEWS + "test_global_and_local_crops_have_their_own_scales",
    ),
    Mutant(
        "contrast and hue are exchanged",
        "data/transforms/multi_crop.py",
        "ops.adjust_contrast, ops.adjust_saturation, ops.adjust_hue",
        "ops.adjust_hue, ops.adjust_saturation, ops.adjust_contrast",
        VIEWS + "test_jitter_factors_belong_to_their_operations",
    ),
    Mutant(
        "constant order of color jitter",
        "data/transforms/multi_crop.py",
        "JITTER_ORDERS[int(len(JITTER_ORDERS) * rng.random())]",
        "JITTER_ORDERS[int(0 * rng.random())]",
        VIEWS + "test_jitter_orders_and_crop_positions_are_uniform",
    ),
    Mutant(
        "solarization above the threshold",
        "data/transforms/pixel_ops.py",
        "np.where(threshold <= levels,",
        "np.where(threshold < levels,",
        VIEWS + "test_gray_and_solarize",
    ),
    Mutant(
        "another mean of the pixels",
        "preprocessing.py",
        "MEAN: RGB = (0.485, 0.456, 0.406)",
        "MEAN: RGB = (0.5, 0.5, 0.5)",
        VIEWS + "test_mean_and_standard_deviation_are_imagenets",
    ),
    Mutant(
        "checksum of an image is ignored",
        "data/shards.py",
        'if zlib.crc32(data) != self.index["crc32"][index].as_py():',
        "if False:",
        "contracts/test_shards.py::test_training_skips_a_damaged_image_and_lists_it",
    ),
    Mutant(
        "damaged JPEGs are decoded",
        "data/decode.py",
        "strict=True)",
        "strict=False)",
        "contracts/test_decode.py::test_damaged_jpegs_are_rejected_and_nothing_is_printed",
    ),
    Mutant(
        "hot pixels decide the bit depth",
        "data/bit_depth.py",
        "SHARE = 0.9999",
        "SHARE = 1.0",
        "contracts/test_bit_depth.py::test_the_depth_is_that_of_the_dataset_without_hot_pixels",
    ),
    Mutant(
        "a network reads other images with their own bit depth",
        "data/loader.py",
        "    dataset = dataset.with_bit_depth(transform.bit_depth)\n",
        "",
        "contracts/test_bit_depth.py::test_a_run_stores_its_depth_and_reads_other_images_with_it",
    ),
    Mutant(
        "changed weights are loaded",
        "models/weights.py",
        "if expected is not None and expected != checksum(state):",
        "if False:",
        "contracts/test_preprocessing.py::test_a_changed_weight_of_an_exported_backbone_is_refused",
    ),
    Mutant(
        "state is not saved before an error of the data",
        "training.py",
        "                    self.save_last()\n            raise\n",
        "                    pass\n            raise\n",
        "invariances/test_worker_failures.py::test_an_error_of_the_data_saves_the_training_state_first",
    ),
    Mutant(
        "two processes train in one folder",
        "files.py",
        "            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "            pass",
        "cli/test_stop_and_resume.py::test_a_run_is_trained_by_one_process_at_a_time",
    ),
    # -- evaluations
    Mutant(
        "layer scale is dropped",
        "models/vit_weights.py",
        '            state[f"{layer}.weight"] = state[f"{layer}.weight"] * gamma[:, None]\n',
        "",
        "contracts/test_foreign_weights.py::test_layer_scale_is_part_of_the_linear_layer_before_it",
    ),
    Mutant(
        "preprocessing of the file is ignored",
        "models/pretrained.py",
        "transform or Preprocessing(size=config.input_size)",
        "Preprocessing()",
        "contracts/test_preprocessing.py::test_weights_are_saved_with_their_preprocessing",
    ),
    Mutant(
        "rows of a killed process are kept",
        "evals/resumable.py",
        "            file.truncate(row * values.strides[0])\n",
        "",
        "contracts/test_resumable.py::test_an_interrupted_command_resumes[npz]",
    ),
    Mutant(
        "cached features of another precision",
        "evals/features.py",
        "precision_of(context), *key",
        "*key",
        "contracts/test_resumable.py::test_cached_features_have_the_precision_of_the_evaluation",
    ),
    Mutant(
        "the rows of a small convolution's kernel have the length of its columns",
        "kernels/small_conv.py",
        "rows[:, None, :, None] * kernel[1]",
        "rows[:, None, :, None] * kernel[0]",
        "equations/test_small_conv.py::test_tiny_maps_have_the_same_outputs_and_gradients",
    ),
    Mutant(
        "the index of a small convolution is an inference tensor",
        "kernels/small_conv.py",
        "@torch.inference_mode(False)  # an evaluation may call it first, and training use the same tensor\n",
        "",
        "equations/test_small_conv.py::test_training_after_an_evaluation_has_gradients",
    ),
    Mutant(
        "equal results have the lower of their ranks",
        "ablations/page.py",
        "(sum(v < x for v in values) + sum(v <= x for v in values)) / 2",
        "sum(v < x for v in values)",
        "contracts/test_ablations.py::test_the_rank_correlation_is_that_of_mean_ranks",
    ),
    # -- the index
    Mutant(
        "equal cosines are not ordered by row",
        "evals/nearest.py",
        "    columns = columns.sort(dim=1).values\n",
        "",
        "equations/test_nearest.py::test_it_is_a_stable_sort_of_all_cosines",
    ),
    Mutant(
        "columns after the last group are not searched",
        "evals/nearest.py",
        "    columns = torch.cat([columns.flatten(1), ungrouped], 1)\n",
        "    columns = columns.flatten(1)\n",
        "equations/test_nearest.py::test_float16_unit_rows_in_shards_are_searched_as_one_array",
    ),
    Mutant(
        "a changed file keeps its features",
        "search/build.py",
        "        same &= table[column].to_numpy()[row] == present\n",
        "        pass\n",
        "contracts/test_index.py::test_an_update_equals_a_new_index_and_reads_only_what_has_changed",
    ),
    Mutant(
        "every update of an index has its own bit depth",
        "search/build.py",
        "            info = with_bit_depth(info, dataset.bit_depth)\n",
        "",
        "contracts/test_bit_depth.py::test_an_index_keeps_the_depth_of_its_first_build",
    ),
    Mutant(
        "damaged images that are used are not listed",
        "data/loader.py",
        "            skipped += dataset.kept_damage\n",
        "",
        "contracts/test_decode.py::test_a_dataset_may_keep_damaged_jpegs_and_lists_them",
    ),
    Mutant(
        "a failed update leaves its files",
        "search/build.py",
        "        writer.discard()\n",
        "        pass\n",
        "contracts/test_index.py::test_a_full_disk_is_one_message_and_the_old_state_stays",
    ),
    Mutant(
        "k-NN votes without temperature",
        "evals/knn.py",
        "(similarity / temperature).exp()",
        "similarity.exp()",
        "equations/test_knn.py::test_closer_neighbors_have_larger_votes",
    ),
    Mutant(
        "a labeled image votes for itself",
        "api/classify.py",
        "fit(x[~test], y[~test], ",
        "fit(x, y, ",
        "cli/test_classify.py::test_an_image_is_never_classified_by_a_classifier_that_has_seen_its_label",
    ),
    Mutant(
        "query among its neighbors",
        "report/snapshots.py",
        " if row != rows[query]",
        "",
        "contracts/test_report.py::test_neighbors_are_the_nearest_other_images",
    ),
    Mutant(
        "linear learning rate without the batch size",
        "evals/linear.py",
        "[lr * min(self.batch, n) / 256 for lr in self.lr]",
        "[lr for lr in self.lr]",
        "equations/test_linear.py::test_learning_rates_are_for_a_batch_of_256",
    ),
    Mutant(
        "the object is always above the mean of the eigenvector",
        "discovery/methods.py",
        "vector = vector if vector[seed] > vector.mean() else -vector",
        "vector = vector",
        "equations/test_discovery.py::test_methods_equal_their_slow_implementations",
    ),
    Mutant(
        "all regions of patches instead of that of the seed",
        "discovery/regions.py",
        "    return mask & (labels == labels.flat[seed])\n",
        "    return mask\n",
        "equations/test_discovery.py::test_components_have_common_sides",
    ),
    Mutant(
        "a changed image keeps its mask",
        "segmentation/folder.py",
        ' and item.digest() == record["digest"]):',
        "):",
        "cli/test_segment.py::test_only_new_and_changed_images_are_segmented",
    ),
    Mutant(
        "padding before the normalization",
        "evals/object_discovery.py",
        "F.pad(pixels, (0, -width % patch, 0, -height % patch))",
        "F.pad(pixels, (0, -width % patch, 0, -height % patch), value=-2.0)",
        "equations/test_object_discovery.py::test_padding_is_zero_after_the_normalization_and_boxes_end_with_the_image",
    ),
    Mutant(
        "mask of the remaining attention",
        "evals/attention_maps.py",
        "np.cumsum(fraction, axis=-1) > 1 - mass",
        "np.cumsum(fraction, axis=-1) > mass",
        "equations/test_attention_mask.py::test_the_mask_is_the_smallest_that_holds_the_mass",
    ),
    Mutant(
        "precision before the first positive",
        "evals/ranking.py",
        "before = count / rank if rank else 1.0",
        "before = count / rank if rank else 0.0",
        "equations/test_ranking.py::test_average_precision_is_the_area_under_the_curve",
    ),
    Mutant(
        "contour tolerance is rounded down",
        "evals/davis_score.py",
        "radius = math.ceil(tolerance",
        "radius = math.floor(tolerance",
        "equations/test_davis_score.py::test_contours_match_within_the_tolerance",
    ),
    Mutant(
        "one more preceding frame",
        "evals/label_propagation.py",
        "deque(maxlen=context)",
        "deque(maxlen=context + 1)",
        "equations/test_video_segmentation.py::test_keys_are_the_first_frame_and_the_preceding_frames",
    ),
    Mutant(
        "only first crops are queries",
        "evals/two_crop_retrieval.py",
        ", *target_ranks(second, first, targets)]",
        "]",
        "equations/test_two_crop_retrieval.py::test_scores_equal_a_loop_over_all_crops",
    ),
    Mutant(
        "a tenth of any number of images without labels is held out",
        "evals/online.py",
        "min(self.val_fraction, MAX_IMAGES / len(dataset))",
        "self.val_fraction",
        "invariances/test_unlabeled_runs.py::test_the_number_of_held_out_images_is_limited",
    ),
    # -- files
    Mutant(
        "checkpoint is not flushed to disk",
        "files.py",
        "os.fsync(file.fileno())",
        "pass",
        "contracts/test_checkpoint.py::test_a_full_disk_is_reported_with_advice",
    ),
    Mutant(
        "checkpoint is not renamed",
        "files.py",
        "os.replace(temporary, path)",
        "path.write_bytes(temporary.read_bytes())",
        "contracts/test_checkpoint.py::test_an_interrupted_write_keeps_the_old_file",
    ),
    Mutant(
        "checkpoint runs code",
        "models/weights.py",
        "weights_only=True, mmap",
        "weights_only=False, mmap",
        "contracts/test_checkpoint.py::test_a_malicious_checkpoint_is_rejected_without_running_code",
    ),
    Mutant(
        "resume skips a step",
        "state.py",
        'self.step, self.best = saved["step"], saved["best"]',
        'self.step, self.best = saved["step"] + 1, saved["best"]',
        "invariances/test_resume.py::test_a_run_abandoned_at_any_step_resumes_with_the_same_result[2]",
    ),
    Mutant(
        "evaluations during training have another size",
        "training_evals.py",
        "size=run.eval_size,",
        "size=run.views.size,",
        "invariances/test_run_protocol.py::test_a_scheduled_evaluation_without_data_is_that_of_the_run",
    ),
    Mutant(
        "verdict ignores the margin",
        "report/verdict.py",
        "if last < reference + needed:",
        "if last < reference:",
        "contracts/test_verdict.py::test_verdicts",
    ),
    Mutant(
        "metrics are not truncated on resume",
        "metrics.py",
        'if line["step"] <= step and step > 0]',
        "]",
        "invariances/test_resume.py::test_a_run_abandoned_at_any_step_resumes_with_the_same_result[2]",
    ),
    Mutant(
        "fingerprint is ignored on resume",
        "state.py",
        'if saved["data"] != dataset.fingerprint:',
        "if False:",
        "invariances/test_resume.py::test_resume_requires_a_checkpoint_and_the_same_images",
    ),
    Mutant(
        "code of an untrusted file is imported",
        "config.py",
        "if not (trust or module in sys.modules):",
        "if False:",
        "equations/test_config.py::test_types_from_outside_are_imported_only_if_trusted",
    ),
    Mutant(
        "report does not escape its title",
        "report/run_report.py",
        "<h1>{escape(run_dir.resolve().name)}</h1>",
        "<h1>{run_dir.resolve().name}</h1>",
        "contracts/test_report.py::test_the_page_loads_nothing_and_escapes_names",
    ),
    # -- duplicates
    Mutant(
        "a chain of duplicates is one group",
        "search/duplicates.py",
        "        linked = tiers < len(TIERS)\n",
        "        linked = tiers <= len(TIERS)\n",
        "equations/test_duplicate_groups.py::test_a_chain_is_cut_so_that_every_copy_is_a_duplicate_of_the_image_that_is_kept",
    ),
    Mutant(
        "hashes of blank images are compared",
        "search/duplicates.py",
        "    return hashes, np.bitwise_count(hashes) >= HASH_BITS\n",
        "    return hashes, np.ones(len(hashes), bool)\n",
        "equations/test_duplicate_groups.py::test_blank_images_are_not_duplicates_by_their_hash",
    ),
    Mutant(
        "copies in the index count as other images",
        "search/calibration.py",
        "        return known[row] != known[other] and not (cosine >= above and is_copy(row, other))\n",
        "        return row != other\n",
        "equations/test_calibration.py::test_duplicates_in_the_index_are_no_other_images",
    ),
    Mutant(
        "a moved file overwrites another one",
        "search/moves.py",
        "    if complete and not filecmp.cmp(source, target, shallow=False):\n",
        "    if False:\n",
        "contracts/test_moves.py::test_no_file_is_overwritten",
    ),
    Mutant(
        "files are moved before the journal is written",
        "search/moves.py",
        "        file.flush()\n",
        "        _move_all(moves, progress)\n",
        "contracts/test_moves.py::test_the_journal_is_complete_before_the_first_move",
    ),
    # -- clusters, map, selection
    Mutant(
        "the lowest silhouette chooses the number of clusters",
        "search/clusters.py",
        "max(scores, key=lambda k: scores[k])",
        "min(scores, key=lambda k: scores[k])",
        "equations/test_clusters.py::test_the_number_of_clusters_has_the_highest_silhouette",
    ),
    Mutant(
        "clusters are not numbered by size",
        "search/clusters.py",
        "np.argsort(-sizes, kind=",
        "np.argsort(sizes, kind=",
        "equations/test_clusters.py::test_groups_are_found_and_numbered_by_size",
    ),
    Mutant(
        "coverage takes the nearest image",
        "search/select.py",
        "int(distances.argmax())",
        "int(distances.argmin())",
        "equations/test_select.py::test_coverage_is_farthest_first",
    ),
    Mutant(
        "typical takes the image of lowest density",
        "search/select.py",
        "return sorted(pairs, reverse=True)",
        "return sorted(pairs)",
        "equations/test_select.py::test_typical_takes_the_densest_image_of_every_cluster_and_the_largest_first",
    ),
    Mutant(
        "a name can end the data of a map",
        "search/map_page.py",
        '.replace("<", ',
        '.replace("\\0", ',
        "equations/test_map.py::test_the_page_runs_its_own_script_and_loads_nothing",
    ),
    Mutant(
        "results of another generation are used",
        "search/results.py",
        "same = all(",
        "same = any(",
        "equations/test_map.py::test_results_are_kept_with_their_key",
    ),
    # -- the web page
    Mutant(
        "requests of other origins are answered",
        "explore/security.py",
        ' or any(origin != f"http://{hosts[0]}" for origin in origins)',
        "",
        "contracts/test_explore.py::test_another_origin_is_refused",
    ),
    Mutant(
        "a selection is deleted by a tab that has not seen its changes",
        "explore/selections.py",
        'operation in ("rename", "delete") and version != state.version',
        'operation == "rename" and version != state.version',
        "contracts/test_explore.py::test_changes_of_two_tabs_are_merged_or_refused",
    ),
    Mutant(
        "uploads are read completely before their size is checked",
        "explore/app.py",
        "        if len(data) > most:\n",
        "        if not data:\n",
        "contracts/test_explore.py::test_uploads_are_limited",
    ),
)


def run_tests(source: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests on the package in `source`; return pytest's exit status and output (-1 if it runs out of time)."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "pythonpath=", "--tb=short"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)]
    env = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return -1, f"no result after {TIMEOUT} s"
    return done.returncode, done.stdout + done.stderr


@contextmanager
def applied(mutant: Mutant, source: Path) -> Iterator[None]:
    """Write the mutant into the package in `source`, and restore the file afterwards."""
    file = source / "dino_ssl" / mutant.file
    compiled = Path(cache_from_source(str(file)))  # its key, modification time and size, may be equal by chance
    before, times = file.read_text(), file.stat()
    file.write_text(before.replace(mutant.old, mutant.new))
    compiled.unlink(missing_ok=True)
    try:
        yield
    finally:
        file.write_text(before)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        compiled.unlink(missing_ok=True)


def check(mutant: Mutant, source: Path) -> str:
    """Return "noticed", or what is wrong with the mutant or its test."""
    file = PACKAGE / mutant.file
    count = file.read_text().count(mutant.old) if file.is_file() else 0
    if count != 1:
        return f"STALE: the text occurs {count} times in {mutant.file}"
    with applied(mutant, source):
        status, output = run_tests(source, [mutant.test])
    if status == TESTS_FAILED:
        return "noticed"
    return "SURVIVED" if status == 0 else f"ERROR: pytest ended with status {status}\n{output[-2000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants whose name contains one of these texts")
    parser.add_argument("--jobs", type=int, default=2, help="mutants that are tested at the same time")
    arguments = parser.parse_args()
    mutants = [m for m in MUTANTS if not arguments.only or any(text in m.name for text in arguments.only)]
    if not mutants:
        parser.error(f"no mutant has a name with {' or '.join(arguments.only)}")

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sources: SimpleQueue[Path] = SimpleQueue()
        for number in range(arguments.jobs):
            sources.put(Path(shutil.copytree(ROOT / "src", Path(folder) / str(number))))

        source = sources.get()
        status, output = run_tests(source, sorted({mutant.test for mutant in mutants}))
        sources.put(source)
        if status != 0:
            print(f"{output[-4000:]}\nThe tests do not pass without a mutant.")
            return 1

        def check_in_free_copy(mutant: Mutant) -> str:
            source = sources.get()
            try:
                return check(mutant, source)
            finally:
                sources.put(source)

        failed = 0
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for mutant, result in zip(mutants, pool.map(check_in_free_copy, mutants), strict=True):
                failed += result != "noticed"
                print(f"{mutant.name:<50} {result}", flush=True)
    print(f"{len(mutants) - failed} of {len(mutants)} mutants noticed in {time.monotonic() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
