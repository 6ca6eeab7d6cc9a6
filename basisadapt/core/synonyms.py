"""What other libraries, and the paper, call our settings; for hints."""

from __future__ import annotations

# A setting's full key to names elsewhere, separated by spaces. Ours are among them where they are theirs too, for what
# has no such setting.
SYNONYMS = {
    "task": "dataset dataset_name data_path train_file",
    "backbone": "model model_name model_name_or_path base_model base_model_name_or_path pretrained",
    "method": "peft_type adapter_type peft_method use_dora use_rslora",
    "adapter.r": "rank dim lora_r lora_rank lora_dim network_dim",
    "adapter.lora_alpha": "alpha network_alpha scale scaling",
    "adapter.dropout": "drop dropout_p p_dropout",
    "adapter.target_modules": "target_module target targets lora_target lora_target_modules modules",
    "adapter.placement": "layers lora_layers where",
    "adapter.basis": "basis_type basis_fn basis_function activation nonlinearity kernel",
    "adapter.num_basis": "n n_basis nbasis num_functions n_functions num_grid n_grid grid_size num_basis_functions",
    "adapter.grid": "grid_type points",
    "adapter.interval": "range grid_range domain bound bounds",
    "adapter.omega_init": "omega omega_0 omega0 w0 bandwidth",
    "adapter.learn_omega": "train_omega trainable_omega",
    "adapter.amplitude_init": "alpha_init init_alpha coefficient_init",
    "adapter.factor_init": "init init_lora_weights lora_init",
    "adapter.identity_path": "residual skip shortcut",
    "adapter.sharing": "share shared sharing_policy tie tied",
    "adapter.transfer_lr": "phi_lr lr_phi alpha_lr omega_lr",
    "train.lr": "lr learning_rate base_lr",
    "train.epochs": "epochs epoch num_epochs n_epochs num_train_epochs",
    "train.max_steps": "max_steps steps num_steps train_steps max_train_steps num_training_steps",
    "train.batch_size": (
        "batch_size batch batchsize bs bsz train_batch_size per_device_train_batch_size micro_batch_size "
        "gradient_accumulation_steps"
    ),
    "train.max_length": "max_length max_len max_seq_len max_seq_length seq_len seq_length cutoff_len",
    "train.schedule": "schedule scheduler lr_scheduler lr_scheduler_type lr_schedule",
    "train.warmup_ratio": "warmup_ratio warmup warmup_steps",
    "train.weight_decay": "weight_decay decay wd",
    "train.max_grad_norm": "max_grad_norm max_norm grad_clip clip_grad clip_grad_norm gradient_clipping",
    "train.precision": "precision fp16 bf16 dtype torch_dtype mixed_precision autocast",
    "train.weights": "load_in_4bit load_in_8bit quantization quantization_config quantize",
    "train.gradient_checkpointing": "gradient_checkpointing checkpointing activation_checkpointing",
    "train.eval_steps": "eval_steps eval_every eval_interval evaluation_steps",
    "train.patience": "patience early_stopping early_stopping_patience",
    "train.train_rows": "max_train_samples train_samples num_samples limit",
    "train.eval_rows": "max_eval_samples eval_samples",
    "train.validation": "val_split val_size val_set_size validation_split validation_size test_size",
    "train.processes": "gpus num_gpus nproc nproc_per_node world_size num_processes",
    "data.text": "text_column text_field dataset_text_field text_key",
    "data.label": "label_column label_field target_column label_key",
}
OURS = {name: key for key, names in SYNONYMS.items() for name in names.split()}


def meant(name: str) -> str | None:
    """The full key of the setting that `name`, with or without a group before it, is elsewhere; None if of none."""
    return OURS.get(name.rpartition(".")[2])
