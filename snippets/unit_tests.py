"""Use when a model is new or changed: five properties that wrong models violate.

Not when you only want to see shapes: a model with leaks or dead parts has those right.
"""

import unittest

import torch
from torch import nn

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model() -> nn.Module:  # yours here
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 3))


class ModelTest(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model = make_model().to(device)
        # device=, not .to(device): the copy would be no leaf and its .grad None.
        self.x = torch.randn(16, 8, device=device, requires_grad=True)
        self.y = torch.randint(3, (16,), device=device)

    def test_one_batch_can_be_learnt(self) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
            loss.backward()
            optimizer.step()
        self.assertLess(loss.item(), 0.1)

    def test_every_parameter_gets_a_gradient(self) -> None:
        self.model(self.x).square().sum().backward()
        for name, parameter in self.model.named_parameters():
            self.assertIsNotNone(parameter.grad, name)
            self.assertGreater(parameter.grad.abs().max().item(), 0, name)

    def test_samples_do_not_see_each_other(self) -> None:
        self.model.eval()
        self.model(self.x)[3].sum().backward()
        others = torch.arange(16, device=device) != 3
        self.assertEqual(self.x.grad[others].abs().max().item(), 0)
        self.assertGreater(self.x.grad[3].abs().max().item(), 0)

    def test_evaluation_is_deterministic_training_is_not(self) -> None:
        self.assertFalse(torch.equal(self.model(self.x), self.model(self.x)))
        self.model.eval()
        self.assertTrue(torch.equal(self.model(self.x), self.model(self.x)))

    def test_weights_survive_saving(self) -> None:
        other = make_model().to(device).eval()
        other.load_state_dict(self.model.state_dict())
        self.assertTrue(torch.equal(other(self.x), self.model.eval()(self.x)))


if __name__ == "__main__":
    unittest.main()
