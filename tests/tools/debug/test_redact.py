"""Nothing secret is in what a user publishes, and nothing harmless is missing."""

import pytest
import yaml

from rayrlhf.tools.debug.redact import HIDDEN, known_secrets, redacted, redacted_tree

SECRET = "Zq8vT3xWm5"


@pytest.mark.parametrize(
    "text",
    [
        f"api_key: {SECRET}",
        f"API_KEY={SECRET} next",
        f"{{'hf_token': '{SECRET}', 'a': 1}}",
        f'{{"aws_secret_access_key": "{SECRET}"}}',
        f'("password", "{SECRET}")',
        f"AWS_ACCESS_KEY_ID={SECRET}",
        f"accessToken: {SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"curl -H 'authorization: Basic {SECRET}=='",
        f"https://user:{SECRET}@host/path",
        f"s3://{SECRET}@bucket/key",
        f"https://host/file?X-Amz-Signature={SECRET}&x=1",
        f"https://host/v1?key={SECRET}",
        f"serve --api-key {SECRET} --port 80",
        f"['serve', '--auth-token', '{SECRET}']",
        f"AccountName=a;AccountKey={SECRET};",
        f"hf_{SECRET}{SECRET}",
        f"sk-proj-{SECRET}{SECRET}",
        f"ghp_{SECRET}{SECRET}{SECRET}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n{SECRET}\n-----END RSA PRIVATE KEY-----",
        f"password: '{SECRET} with spaces'",
        f"eyJ{SECRET}.{SECRET}.{SECRET}",
        f"Authorization: Token {SECRET}",
        f"Cookie: a=1234567; session={SECRET}",
        f'{{"body": "{{\\"api_key\\": \\"{SECRET}\\"}}"}}',
        f"os.environ['WANDB_API_KEY'] = '{SECRET}'",
    ],
)
def test_a_secret_is_removed_from_any_text(text):
    found = redacted(text)
    assert SECRET not in found
    assert HIDDEN in found


@pytest.mark.parametrize(
    "text",
    [
        "max_new_tokens: 32",
        "tokens_per_second=12.5",
        "eos_token: </s>",
        "token: 17",
        "step 4: sample 0 of prompt 2 has other tokens than were sampled",
        "https://host/path?page=2",
        "s3://bucket/key",
        "prompt_key: question",
        'File "/home/me/reward.py", line 12, in score',
        "password: null",
        "author@example.org wrote it",
    ],
)
def test_harmless_text_stays(text):
    assert redacted(text) == text


def test_settings_lose_secrets_by_the_names_of_their_keys_whatever_their_form():
    tree = yaml.safe_load(
        f"reward:\n  headers:\n    x-api-key: >-\n      {SECRET}\n      {SECRET}\n  pin_password: 1234\n  timeout: 3\n"
    )
    tree["reward"] |= {"credentials": {"value": SECRET}, "api_keys": [SECRET]}
    found = redacted_tree(tree)
    hidden = {"headers": {"x-api-key": HIDDEN}, "pin_password": HIDDEN, "credentials": {"value": HIDDEN}, "api_keys": [HIDDEN]}
    assert found == {"reward": {"timeout": 3} | hidden}


def test_values_of_secret_variables_are_removed_wherever_they_occur(monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", f"own {SECRET}")
    known = known_secrets([{"OTHER_KEY": f"theirs {SECRET}", "PATH": "/usr/bin", "SHORT_TOKEN": "abc"}])
    assert {f"own {SECRET}", f"theirs {SECRET}"} <= known
    assert not {"/usr/bin", "abc"} & known
    assert redacted(f"said own {SECRET} twice", known) == f"said {HIDDEN} twice"
