"""Programs whose tests use more than plain values: what crosses between a test and the program's process."""

import pytest

from rayrlhf.rewards import sandbox
from rayrlhf.rewards.programs import code

LACKING = sandbox.missing()
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"programs cannot be contained here: {LACKING}")

CASES = {
    "plain": (
        "def f(x): return [x, (1, 2.5), {'a': {1}}]",
        [
            "assert f(1) == [1, (1, 2.5), {'a': {1}}]",
            "assert f(2**80)[0] == 2**80",
            "assert f(float('inf'))[0] == float('inf')",
            "assert f(b'a')[0]==b'a'",
            "assert f(None)[0] is None",
            "assert f(True)[0] is True",
            "assert f('\\ud800')[0] == '\\ud800'",
        ],
    ),
    "mutation": (
        """\
def srt(l): l.sort()
def upd(d): d['k']=1
def rot(m): m[:] = [list(r) for r in zip(*m[::-1])]
""",
        [
            """\
l=[3,1,2]
srt(l)
assert l==[1,2,3]
""",
            """\
d={}
upd(d)
assert d=={'k':1}
""",
            """\
m=[[1,2],[3,4]]
rot(m)
assert m==[[3,1],[4,2]]
""",
        ],
    ),
    "exceptions": (
        """\
class MyError(ValueError):
  pass
class Sub(MyError): pass
def f(x):
  if x<0: raise Sub('neg', x)
  if x==0: return 1/0
  import json
  json.loads('{')
""",
        [
            """\
try:
  f(-1)
  assert False
except MyError as e:
  assert e.args == ('neg', -1) and 'neg' in str(e)
""",
            """\
try:
  f(-1)
  raise SystemExit
except ValueError: pass
""",
            """\
try:
  f(0)
  assert False
except ZeroDivisionError: pass
""",
            """\
import json
try:
  f(1)
  assert 0
except json.JSONDecodeError: pass
""",
            """\
try:
  f(-1)
except Sub: pass
""",
        ],
    ),
    "classes": (
        """\
class Stack:
  def __init__(self): self.items=[]
  def push(self,x): self.items.append(x)
  def pop(self): return self.items.pop()
  def __len__(self): return len(self.items)
  def __bool__(self): return bool(self.items)
  def __iter__(self): return iter(self.items)
  def __getitem__(self,i): return self.items[i]
  def __enter__(self): return self
  def __exit__(self,*a): return True
""",
        [
            """\
s=Stack()
s.push(1);s.push(2)
assert len(s)==2 and s.pop()==2 \
  and s[0]==1 and list(s)==[1] and 1 in s
""",
            """\
s=Stack()
assert not s
""",
            "assert isinstance(Stack(), Stack) and not isinstance(3, Stack)",
            """\
with Stack() as s:
  raise ValueError
""",
            """\
s=Stack()
s.items=[5]
assert s.pop()==5
""",
            "s=Stack(); s.push([1]); assert s.pop()==[1]",
        ],
    ),
    "operators": (
        """\
class V:
  def __init__(s,x,y): s.x, s.y = x, y
  def __add__(s,o): return V(s.x+o.x,s.y+o.y)
  def __mul__(s,k): return V(s.x*k,s.y*k)
  __rmul__=__mul__
  def __eq__(s,o): return (s.x,s.y)==(o.x,o.y)
  def __hash__(s): return hash((s.x,s.y))
  def __repr__(s): return f'V({s.x}, {s.y})'
  def __lt__(s,o): return s.x<o.x
  def __neg__(s): return V(-s.x,-s.y)
  def __abs__(s): return 5
  def __call__(s, a): return a
""",
        [
            "assert V(1,2)+V(3,4)==V(4,6)",
            "assert V(1,2)*3==V(3,6)",
            "assert 3*V(1,2)==V(3,6)",
            "assert len({V(1,2),V(1,2)})==1",
            "assert repr(V(1,2))=='V(1, 2)'",
            "assert sorted([V(2,0),V(1,0)])[0].x==1",
            "assert V(1,2)!=V(2,2)",
            "assert (-V(1,2)).x==-1",
            "assert abs(V(3,4))==5",
            "assert V(1,1)(7)==7",
            "assert V(1,2) in [V(1,2)]",
            "assert f'{V(1,2)}'=='V(1, 2)'",
            "assert V(1,2) is not None and V(1,2) != None",
        ],
    ),
    "callbacks": (
        """\
def apply(g, xs): return [g(x) for x in xs]
def red(g, it):
  a=0
  for x in it: a=g(a,x)
  return a
""",
        [
            "assert apply(lambda x: x+1,[1,2])==[2,3]",
            "assert red(lambda a,b:a+b, (i for i in range(4)))==6",
            "assert apply(str,[1])==['1']",
            """\
import math
assert apply(math.sqrt,[4])==[2]
""",
            "assert red(lambda a,b:a+b, iter([1,2]))==3",
            """\
def boom(x): raise KeyError(x)
try:
  apply(boom,[1])
  assert 0
except KeyError: pass
""",
        ],
    ),
    "generators": (
        """\
def gen(n):
  for i in range(n): yield i*i
""",
        [
            "assert list(gen(3))==[0,1,4]",
            """\
g=gen(2)
assert next(g)==0
assert next(g)==1
try:
  next(g)
  assert 0
except StopIteration: pass
""",
            "g=gen(1)\nnext(g)\ntry:\n  g.send(4)\n  assert 0\nexcept StopIteration: pass",
            "assert sum(gen(4))==14",
            "assert [x for x in gen(2)]==[0,1]",
        ],
    ),
    "types": (
        """\
from collections import *
from decimal import Decimal
from fractions import Fraction
import datetime, enum
P=namedtuple('P','x y')
class C(enum.IntEnum):
  R=1
class E(enum.Enum):
  A='a'
def f(k): return {
  'd':deque([1]),'c':Counter('aa'),'dd':defaultdict(list,{1:[2]}),'o':OrderedDict(a=1),
  'D':Decimal('1.5'),'F':Fraction(1,3),'dt':datetime.date(2020,1,2),'dtt':datetime.datetime(2020,1,2,3),
  'p':P(1,2),'e':C.R,'E':E.A,'r':range(3),'z':1+2j,'fs':frozenset([1]),'td':datetime.timedelta(1)}[k]
""",
        [
            "assert f('c')=={'a':2}",
            "assert f('dd')[1]==[2] and f('dd')=={1:[2]}",
            "assert f('o')=={'a':1}",
            "assert f('F')*3==1",
            "assert f('D')==1.5",
            """\
import datetime
assert f('dt')==datetime.date(2020,1,2)
""",
            "assert f('p')==(1,2) and f('p').x==1",
            "assert f('e')==1 and f('e').name=='R'",
            "assert f('E')==E.A and f('E').value=='a'",
            "assert f('r')==range(3)",
            "assert f('z').imag==2",
            "assert f('fs')=={1}",
            """\
from collections import deque
assert f('d')==deque([1])
""",
            "assert f('dtt')==datetime.datetime(2020,1,2,3)",
            "assert f('td').days==1",
            "assert Counter('ab')==Counter('ba')",
            "assert isinstance(f('c'), dict)",
            "assert f('dd')==defaultdict(list,{1:[2]})",
        ],
    ),
    "nodes": (
        """\
class Node:
  def __init__(s,v,n=None): s.val,s.next=v,n
def rev(h):
  p=None
  while h: h.next,p,h=p,h,h.next
  return p
""",
        [
            """\
h=rev(Node(1,Node(2)))
assert h.val==2 and h.next.val==1
assert h.next.next is None
""",
            """\
class L:
  def __init__(s,v,n=None): s.val,s.next=v,n
h=rev(L(1,L(2)))
assert h.val==2 and h.next.val==1
assert h.next.next is None
""",
        ],
    ),
    "humaneval": (
        """\
from typing import List
def f(x: List[float]) -> float: return sum(x)/len(x)
""",
        [
            """\
METADATA={}
def check(candidate):
  assert abs(candidate([1.0,2.0])-1.5)<1e-6
  assert candidate([2.0])==2.0
check(f)
""",
            "def g(x: List[int]): pass",
        ],
    ),
    "builtin name": (
        "def sum(a,b): return a+b",
        [
            "assert sum(1,2)==3",
        ],
    ),
    "module of program": (
        """\
import math
def f(): return 2.0000000001
""",
        [
            "assert math.isclose(f(),2)",
        ],
    ),
    "globals": (
        """\
n=0
def inc():
  global n
  n+=1
""",
        [
            """\
inc()
inc()
assert n==2
""",
        ],
    ),
    "files": (
        "open('o.txt','w').write('hi')",
        [
            "assert open('o.txt').read()=='hi'",
        ],
    ),
    "stringio": (
        "def f(io): return io.read().split()",
        [
            """\
import io
assert f(io.StringIO('a b'))==['a','b']
""",
        ],
    ),
    "inherit": (
        """\
class A:
  def f(s): return 1
""",
        [
            """\
a=A()
assert a.f()==1 and hasattr(a,'f') and not hasattr(a,'g')
""",
            "assert A.f(A())==1",
        ],
    ),
    "dataclass": (
        """\
from dataclasses import dataclass
@dataclass
class P:
  x:int
  y:int=0
def f(): return P(1)
""",
        [
            "assert f()==P(1,0) and f().y==0",
        ],
    ),
    "async": (
        """\
import asyncio
async def f(): return 3
def g(): return asyncio.run(f())
""",
        [
            "assert g()==3",
            """\
import asyncio
assert asyncio.run(f())==3
""",
        ],
    ),
}


@pytest.fixture(scope="module")
def shares() -> dict[str, float | None]:
    programs, tests = zip(*CASES.values(), strict=True)
    paid = code(list(programs), tests=list(tests), where="whole", partial=True, cpu_seconds=20, wall_seconds=120.0)
    return dict(zip(CASES, paid, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_right_program_passes_all_tests_of_its_kind(name, shares):
    assert shares[name] == 1.0
