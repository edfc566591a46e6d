#!/bin/bash
# Stage 2 with LoRA on the language model, and the tower's adapter, on LLaVA's 665K conversations. Run in LLaVA's folder.
set -euo pipefail
TOWER=${TOWER:-"diffenc:sdxl?grid=24&rank=16"}
HERE=$(cd "$(dirname "$0")" && pwd)

${LAUNCH:-deepspeed} "$HERE/train_diffenc.py" \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --deepspeed ./scripts/zero2.json \
    --model_name_or_path lmsys/vicuna-7b-v1.5 \
    --version v1 \
    --data_path ./playground/data/llava_v1_5_mix665k.json \
    --image_folder ./playground/data \
    --vision_tower "$TOWER" \
    --pretrain_mm_mlp_adapter ./checkpoints/llava-diffenc-pretrain/mm_projector.bin \
    --mm_projector_type mlp2x_gelu \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir ./checkpoints/llava-diffenc-lora \
    --num_train_epochs 1 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 2 \
    --evaluation_strategy no \
    --save_strategy steps --save_steps 50000 --save_total_limit 1 \
    --learning_rate 2e-4 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to none \
    "$@"
