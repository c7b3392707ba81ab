"""A classifier of reviews of different lengths. The mistake: the padding mask says 1 where there is a word.

Seen in InseeFrLab/torchTextClassifiers pull request 92, mlwithme/TransformerTranslation issue 6.
"""

import argparse

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument("--bug", action="store_true")
parser.add_argument("--epochs", type=int, default=4)
args = parser.parse_args()
torch.manual_seed(21)
PAD, VOCAB = 0, 60


class Reviews(Dataset):
    def __init__(self, n):
        self.texts = [torch.randint(1, VOCAB, (int(k),)) for k in torch.randint(4, 20, (n,))]
        self.labels = [int((text > VOCAB // 2).float().mean() > 0.5) for text in self.texts]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return self.texts[index], self.labels[index]


def collate(batch):
    texts, labels = zip(*batch)
    input_ids = pad_sequence(texts, batch_first=True, padding_value=PAD)
    return input_ids, (input_ids != PAD).long(), torch.tensor(labels)


class SentimentTransformer(nn.Module):
    def __init__(self, d_model=32):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, d_model, padding_idx=PAD)
        self.position = nn.Embedding(20, d_model)
        layer = nn.TransformerEncoderLayer(d_model, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(d_model, 2)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids) + self.position(torch.arange(input_ids.size(1)))
        padding = attention_mask.bool() if args.bug else attention_mask == 0
        x = self.encoder(x, src_key_padding_mask=padding)
        weights = attention_mask.unsqueeze(-1).float()
        return self.classifier((x * weights).sum(1) / weights.sum(1))


loader = DataLoader(Reviews(240), batch_size=16, shuffle=True, collate_fn=collate)
model = SentimentTransformer()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
criterion = nn.CrossEntropyLoss()
for epoch in range(args.epochs):
    right = total = 0
    for input_ids, attention_mask, labels in loader:
        logits = model(input_ids, attention_mask)
        loss = criterion(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right += (logits.argmax(-1) == labels).sum().item()
        total += len(labels)
    print(f"epoch {epoch} loss {loss.item():.3f} accuracy {right / total:.2f}")
