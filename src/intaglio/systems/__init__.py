"""How each model is trained: one LightningModule each."""
